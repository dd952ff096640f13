"""Train on a dataset folder of memfree with your own Lightning Trainer."""

from lightning import Trainer

from memfree.data import ShardDataModule
from memfree.models import DDPMModule, ModelOptions
from memfree.training import ExponentialMovingAverage, ExposureCounter, FiniteTraining


def main(dataset: str = "data/digits", out: str = "runs/own_trainer", steps: int = 1500) -> None:
    """Train a class-conditional DDPM; save its averaged weights as a diffusers pipeline."""
    data = ShardDataModule(dataset, batch_size=64)
    model = DDPMModule(ModelOptions(class_conditional=True), data.image_shape, data.num_classes)
    callbacks = [ExposureCounter(), FiniteTraining(), ExponentialMovingAverage(decay=0.995)]
    trainer = Trainer(max_steps=steps, default_root_dir=out, callbacks=callbacks)
    trainer.fit(model, datamodule=data)
    model.pipeline().save_pretrained(f"{out}/diffusers")


if __name__ == "__main__":
    main()
