"""Draw from a diffusers pipeline without copying the images that an index holds."""

from pathlib import Path

from diffusers import DiffusionPipeline

import memfree


def main(model: str = "runs/emoji_scratch/diffusers", index: str = "runs/emoji-index") -> None:
    """Draw an image for each prompt; draw copies again, and leave out what stays a copy."""
    pipe = DiffusionPipeline.from_pretrained(model)
    prompts = ["grinning face", "alarm clock"]
    with memfree.guard(pipe, memfree.ReferenceIndex.load(index), on_copy="resample") as report:
        images = pipe(prompts, num_inference_steps=25).images
    print(report)
    out = Path("runs/guarded")
    out.mkdir(parents=True, exist_ok=True)
    for prompt, image in zip(prompts, images, strict=True):
        if image is not None:  # None: a copy in every draw
            image.save(out / f"{prompt}.png")


if __name__ == "__main__":
    main()
