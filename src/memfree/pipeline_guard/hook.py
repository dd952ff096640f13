"""Forward hook on the denoiser: prediction, guidance, and back into the call (eq. 10)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from torch import Tensor

from memfree.conditions import Conditions, TextConditions
from memfree.diffusion_math import PredictionType
from memfree.guidance import Guidance, Prediction
from memfree.guidance.prediction import apply, combine
from memfree.pipeline_guard.call import finite_rows, image_count
from memfree.pipeline_guard.decode import Decoder, explained_chunks
from memfree.pipeline_guard.denoiser import Before, CacheCheck, Signature, callback_aside, hooked
from memfree.pipeline_guard.families import Arguments, Family
from memfree.pipeline_guard.noise_level import NoiseLevel, NoiseLevels
from memfree.sampling.last_step import LastStep, last_step
from memfree.sampling.loop import trace_rows
from memfree.sampling.noise import OwnRandomness


def rows_of(arguments: Any, rows: Tensor, count: int) -> Any:
    """The arguments for some rows: tensors with ``count`` rows are indexed, at any depth."""
    if isinstance(arguments, Tensor):
        if arguments.ndim and len(arguments) == count:
            return arguments[rows.to(arguments.device)]
        return arguments
    if isinstance(arguments, dict):
        return {name: rows_of(value, rows, count) for name, value in arguments.items()}
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(rows_of(value, rows, count) for value in arguments)
    return arguments


def usable(arguments: Any) -> Any:
    """The arguments outside of inference mode: tensors made inside it are copied."""
    if isinstance(arguments, Tensor):
        return arguments.clone() if arguments.is_inference() else arguments
    if isinstance(arguments, dict):
        return {name: usable(value) for name, value in arguments.items()}
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(usable(value) for value in arguments)
    return arguments


class Draw:
    """One call of the pipeline, seen from its denoiser.

    Rows in which a guidance is active get the corrected prediction in both halves of the batch of
    classifier-free guidance, so that the pipeline's ``u + s·(c − u)`` leaves it as it is, in any
    precision, and multistep schedulers keep it in their history. All other rows leave as they came.

    Args:
        pipe: the pipeline.
        family: its kind.
        call: arguments of the pipeline call by name, defaults included.
        guidances: in order.
        decoder: from latents to images.
    """

    def __init__(
        self,
        pipe: Any,
        family: Family,
        call: Mapping[str, Any],
        guidances: Sequence[Guidance],
        decoder: Decoder,
    ) -> None:
        self.pipe = pipe
        self.family = family
        self.call = call
        self.guidances = guidances
        self.decoder = decoder
        self.trace: list[dict[str, Tensor]] = []
        self.unmoved = False
        """Whether the scheduler's last step was found not to follow the prediction."""
        self.finished = False
        """Whether the denoiser was called for the schedule's last step."""
        self.last: Prediction | None = None
        """The record of the latest step, as the guidances left it."""
        self.given: Tensor | None = None
        """Latents of the given image (B, C, h, w), which an inpainting pipeline puts back itself
        after every step; None where the denoiser sees them, or there are none."""
        self.mask: Tensor | None = None
        """(B, 1, h, w), twice with both branches: what that pipeline draws (1) or puts back (0)."""
        self.levels = NoiseLevels(pipe.scheduler, family.flow)
        self._memory: dict[Any, Any] = {}
        self._like: Tensor | None = None
        self._randomness = OwnRandomness()
        self._ended = False
        self._images = image_count(call) if call else None
        known = getattr(diffusers, family.model)
        needed = (family.sample, "timestep", "encoder_hidden_states")
        self._signature = Signature(self.denoiser, known, needed)
        self._check_cache: CacheCheck | None = None
        self._positional = 0
        """How many arguments the pipeline gives its denoiser without a name."""

    @property
    def denoiser(self) -> Any:
        """The pipeline's denoiser."""
        return getattr(self.pipe, self.family.denoiser)

    @contextmanager
    def hooked(self, before: Before | None = None) -> Iterator[None]:
        """Around the pipeline's own call: the hooks on its denoiser, for that call alone.

        Args:
            before: a forward pre-hook beside ``after``.

        Raises:
            ValueError: the pipeline stepped without calling the denoiser that it began with.
        """
        if any(getattr(one, "calls_denoiser", True) for one in self.guidances):
            self._check_cache = CacheCheck(self.denoiser)
        with hooked(self.denoiser, self.after, before):
            yield
        if self.guidances:
            self.levels.check_followed(bool(getattr(self.pipe, "interrupt", False)))

    def callbacks_aside(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with callbacks in which the guard is not at work: they may draw as well."""
        return {
            name: self._watched(value) if name.startswith("callback") and callable(value) else value
            for name, value in call.items()
        }

    def _watched(self, callback: Any) -> Any:
        """A callback after which the pipeline must have the parts that it began with."""
        parts = {name: getattr(self.pipe, name) for name in (self.family.denoiser, "scheduler")}

        def check() -> None:
            for name, part in parts.items():
                if getattr(self.pipe, name) is not part:
                    raise ValueError(
                        f"memfree.guard: a callback replaced the {name} during the call, where the "
                        "guard cannot follow: replace it between calls"
                    )

        return callback_aside(callback, check)

    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The forward hook: the denoiser's output with the active rows corrected."""
        try:
            view, raw, found = self._step(args, kwargs, output)
        except ValueError:
            if self.guidances:
                raise
            self.last = None  # a call that is only judged need not be followed
            return None
        if found is None:
            return None
        rows, corrected = found
        changed = raw.clone()
        target = self.family.prediction(changed, view.channels)
        for half in range(0, view.total, view.count):
            target[rows + half] = corrected
        return (changed, *output[1:]) if isinstance(output, tuple) else type(output)(sample=changed)

    def _step(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> tuple[View, Tensor, tuple[Tensor, Tensor] | None]:
        """One call of the denoiser: what was asked, what it returned, and what is corrected."""
        with torch.inference_mode(False), torch.no_grad():
            arguments = usable(self.bound(args, kwargs))
            raw = usable(output[0] if isinstance(output, tuple) else output.sample)
            planned = getattr(self.pipe, "num_timesteps", None)
            level = self.levels.next(arguments["timestep"], planned)
            self.finished = level.is_last
            if level.step == 0 and self._check_cache is not None:
                self._check_cache()
            view = self.view(arguments, level)
            return view, raw, self.guided(view, raw)

    def encode(self, captions: Sequence[str]) -> TextConditions:
        """Captions as the prompts of this call; one function for all steps, which guidances keep.

        Not for the next call of the pipeline: its options may be others.

        Raises:
            ValueError: the call's embeddings are of other text encoders.
        """
        assert self._like is not None
        _, length, width = self._like.shape
        encoded = self.family.encode(self.pipe, captions, self.call, length)
        if encoded.embeddings.shape[2] != width:
            raise ValueError(
                f"memfree.guard: prompt_embeds have vectors of {width}, the pipeline's own "
                f"encoding has {encoded.embeddings.shape[2]}: load all text encoders, or leave "
                "out guidance that needs captions (c2=0)"
            )
        return encoded.to(self._like.device, self._like.dtype)

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The denoiser's arguments by name: pipelines differ in what they name."""
        self._positional = len(args)
        return self._signature.bind(args, kwargs)

    def as_called(self, arguments: Arguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments in the form in which the pipeline gives them: as many without a name."""
        return self._signature.unbind(arguments, self._positional)

    def view(self, arguments: Arguments, level: NoiseLevel) -> View:
        """The denoiser's call in the terms of a guidance."""
        scale = getattr(self.pipe, "guidance_scale", self.call.get("guidance_scale", 1.0))
        twice = getattr(self.pipe, "do_classifier_free_guidance", scale > 1)
        expected = None if self._images is None else self._images * (1 + bool(twice))
        total = len(arguments[self.family.sample])
        if expected is not None and total != expected:
            raise ValueError(
                f"memfree.guard: {type(self.pipe).__name__} calls its denoiser with a batch of "
                f"{total}, where {self._images} images with guidance_scale {float(scale):g} are "
                f"{expected}: the guard needs both branches of classifier-free guidance in one "
                "batch, and all images"
            )
        return View(self, arguments, level, float(scale) if twice else 1.0, bool(twice))

    def own_randomness(self, part: str, drawing: Sequence[Any]) -> AbstractContextManager[None]:
        """Where the guard's own parts may draw, such as an autoencoder: torch's stay in place.

        Args:
            part: with one autoencoder it draws always or never.
            drawing: what runs there; what is not of this package may draw at any step.
        """
        device = self.pipe._execution_device
        if all(type(one).__module__.startswith("memfree.") for one in drawing):
            return self._randomness.if_drawn(device, self.decoder.draws, part)
        return self._randomness.on(device)

    def _step_of(self, view: View, base: Prediction) -> tuple[Any, ...]:
        """The scheduler's step from here, as ``LastStep`` takes it."""
        scheduler, following = self.pipe.scheduler, view.level.following
        return (
            scheduler,
            scheduler.timesteps[-1 - len(following)],
            view.native_x_t,
            view.native(base),
            view.level.alpha_bar,
            float(self.call.get("eta", 0.0)),
            self.call.get("generator"),
            view.level.flow_sigma,
            following,
        )

    def _ends(self, view: View, base: Prediction) -> bool:
        """Whether the finished sample is decided at this step: no further one follows it."""
        if len(view.level.following) == 1:
            self._ended = LastStep(*self._step_of(view, base)).is_last()
            return self._ended
        return view.level.is_last and not self._ended

    def guided(self, view: View, raw: Tensor) -> tuple[Tensor, Tensor] | None:
        """Which rows are corrected, and the prediction to step with there; None if none is.

        Args:
            view: the denoiser's call.
            raw: what the denoiser returned, all halves.
        """
        native = self.family.prediction(raw, view.channels)
        uncond, cond = native.chunk(2) if view.twice else (None, native)
        amount = float(getattr(self.pipe, "guidance_rescale", 0.0)) if view.twice else 0.0
        self._like = view.conditions.embeddings
        base = Prediction(
            x_t=view.x_t,
            alpha_bar=view.level.alpha_bar,
            time=view.level.time,
            output=view.from_native(combine(cond, uncond, view.scale)),
            output_cond=view.from_native(cond),
            output_uncond=None if uncond is None else view.from_native(uncond),
            conditions=view.conditions,
            guidance_scale=view.scale,
            prediction_type=view.prediction_type,
            denoise=view.denoise,
            guidance_rescale=amount,
            step=view.level.step,
            decode=self.decoder.estimate,
            encode=None if self.family.missing_text_part(self.pipe) else self.encode,
            memory=self._memory,
        )
        base = replace(base, output=base.as_stepped(base.output, base.output_cond))
        self.last = base
        if not self.guidances:
            return None
        finite = finite_rows(base.output) & view.finite
        base = _in_numbers(base)
        if self._ends(view, base):
            ending = last_step(LastStep(*self._step_of(view, base)))
            base = replace(base, is_last=True, decode=_decoded(self.decoder.finished), **ending)
            known = ending["returned"]
            self.unmoved = known is not None and known[1] == 0
            if self.given is not None:
                base = self._inpainted(base)
        decoder = self.decoder
        decoder.follow(self.pipe.vae)
        with (
            explained_chunks("guiding", view.count, decoder.chunk_size, decoder.ways()),
            self.own_randomness("the end" if base.is_last else "the way", self.guidances),
        ):
            result = apply(self.guidances, base)
        self.trace.append(trace_rows(result, view.level.step, view.level.t))
        self.last = result
        changed = (result.output != base.output).flatten(1).any(dim=1) & finite
        rows = changed.nonzero().squeeze(1)
        if not len(rows):
            return None
        return rows, view.to_native(result.output[rows], base.output[rows], native, rows)

    def _inpainted(self, base: Prediction) -> Prediction:
        """The last record with the given image where the pipeline puts it back."""
        assert self.given is not None and self.mask is not None
        # As the pipeline: of the mask of both branches, the first half is used.
        drawn, given = self.mask[: len(base.x_t)].float(), self.given.float()
        offset, gain = base.returned or (torch.zeros_like(base.x_t, dtype=torch.float32), 1.0)
        known = drawn * offset + (1 - drawn) * given, (gain * drawn).expand_as(offset)
        if (finish := base.finish) is None:
            return replace(base, returned=known)
        return replace(
            base, returned=known, finish=lambda x_0: drawn * finish(x_0) + (1 - drawn) * given
        )


def _numbers(values: Tensor) -> Tensor:
    """0 for NaN and ∞, of which no neighbour can be found."""
    return values.nan_to_num(0.0, 0.0, 0.0)


def _decoded(decode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda latents: _numbers(decode(latents))


def _in_numbers(prediction: Prediction) -> Prediction:
    """The record in numbers: one broken sample does not end the call of the others.

    Rows that hold NaN or ∞ are not corrected.
    """
    uncond, cond = prediction.output_uncond, prediction.output_cond
    return replace(
        prediction,
        output=_numbers(prediction.output),
        output_cond=None if cond is None else _numbers(cond),
        output_uncond=None if uncond is None else _numbers(uncond),
        decode=_decoded(prediction.decode),
    )


@dataclass
class View:
    """One call of the denoiser: rows, conditions and parameterisation, and calls like it.

    Flow matching has x_t = (1−σ)·x_0 + σ·ε and v = ε − x_0, which is not variance preserving. With
    n = √((1−σ)² + σ²), x_t/n is, with √ᾱ = (1−σ)/n, and n·v + (1−2σ)·x_t/n is its v prediction
    √ᾱ·ε − √(1−ᾱ)·x_0: guidances see that, and what they change of it goes back divided by n.
    """

    draw: Draw
    arguments: Arguments
    level: NoiseLevel
    scale: float
    """s_0; 1 without classifier-free guidance."""
    twice: bool
    """Whether the batch holds an unconditional half, before the conditional one."""
    x_t: Tensor = field(init=False)
    """(B, C, h, w), variance preserving."""
    conditions: TextConditions = field(init=False)
    """Of the conditional half."""

    def __post_init__(self) -> None:
        everything = self.arguments[self.draw.family.sample]
        self.total = len(everything)
        self.count = self.total // 2 if self.twice else self.total
        # Inpainting denoisers see a mask and an image in further channels.
        self.channels = min(everything.shape[1], self.draw.pipe.vae.config.latent_channels)
        self.dtype = everything.dtype
        x_t = everything[: self.count, : self.channels]
        self.finite = finite_rows(x_t)
        self.native_x_t = x_t = _numbers(x_t)
        self.norm = 1.0
        if self.level.flow_sigma is not None:
            sigma = self.level.flow_sigma
            self.norm = float(((1 - sigma) ** 2 + sigma**2) ** 0.5)
            x_t = x_t.float() / self.norm
        self.x_t = x_t
        self.conditions = self.draw.family.conditions(self.arguments)[
            slice(self.total - self.count, self.total)
        ]

    @property
    def prediction_type(self) -> PredictionType:
        """In which terms guidances see the prediction."""
        if self.level.flow_sigma is not None:
            return "v_prediction"
        kind: PredictionType = self.draw.pipe.scheduler.config.prediction_type
        return kind

    def from_native(self, output: Tensor, x_t: Tensor | None = None) -> Tensor:
        """The model's prediction as guidances see it; ``x_t`` if it is of other samples."""
        if self.level.flow_sigma is None:
            return output
        samples = self.x_t if x_t is None else x_t
        return self.norm * output.float() + (1 - 2 * self.level.flow_sigma) * samples.float()

    def native(self, prediction: Prediction) -> Tensor:
        """The combined prediction in the model's own terms: v of flow matching."""
        if self.level.flow_sigma is None:
            return prediction.output
        shift = (1 - 2 * self.level.flow_sigma) * self.x_t.float()
        return (prediction.output - shift) / self.norm

    def to_native(self, corrected: Tensor, before: Tensor, native: Tensor, rows: Tensor) -> Tensor:
        """What the denoiser should have said in some rows: the inverse of ``from_native``."""
        if self.level.flow_sigma is None:
            return corrected.to(native.dtype)
        uncond, cond = native.chunk(2) if self.twice else (None, native)
        combined = combine(cond, uncond, self.scale)[rows].float()
        return (combined + (corrected - before) / self.norm).to(native.dtype)

    def denoise(self, x: Tensor, conditions: Conditions | None) -> Tensor:
        """The denoiser at this step for rows of x_t; through ``forward``, which fires no hook.

        Raises:
            ValueError: the unconditional prediction is asked for and the pipeline makes none.
        """
        if conditions is None and not self.twice:
            raise ValueError(
                "memfree.guard: this guidance needs the unconditional prediction, which the "
                "pipeline makes with a guidance_scale above 1 only, and never with a denoiser that "
                "is told the scale"
            )
        rows = self._rows(x)
        half = rows if conditions is None else rows + (self.total - self.count)
        family = self.draw.family
        arguments = rows_of(self.arguments, half, self.total)
        sample, beside = (
            (x * self.norm).to(self.dtype),
            arguments[family.sample][:, self.channels :],
        )
        arguments[family.sample] = torch.cat([sample, beside], 1) if beside.shape[1] else sample
        if conditions is not None:
            assert isinstance(conditions, TextConditions)
            like = self.conditions.embeddings
            arguments = family.told(arguments, conditions.to(like.device, like.dtype))
        args, kwargs = self.draw.as_called(arguments)
        output = self.draw.denoiser.forward(*args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output.sample
        return self.from_native(family.prediction(output, self.channels), x)

    def _rows(self, x: Tensor) -> Tensor:
        """Which rows of x_t these are: each has arguments of its own (sizes, image prompts)."""
        everyone = torch.arange(self.count, device=x.device)
        if len(x) == self.count:
            return everyone
        same = (x.detach()[:, None] == self.x_t[None]).flatten(2).all(dim=2)
        # A sample that is none of x_t's rows takes the first row's arguments.
        return same.float().argmax(dim=1)
