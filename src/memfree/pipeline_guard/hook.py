"""Forward hook on the denoiser: guides its prediction and returns it to the pipeline (eq. 10)."""

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
from memfree.pipeline_guard.decode import Decoder
from memfree.pipeline_guard.denoiser import Before, CacheCheck, Signature, callback_aside, hooked
from memfree.pipeline_guard.families import Arguments, Family
from memfree.pipeline_guard.noise_level import NoiseLevel, NoiseLevels
from memfree.sampling.last_step import LastStep, last_step
from memfree.sampling.loop import trace_rows
from memfree.sampling.noise import OwnRandomness


def mapped(change: Callable[..., Tensor], *arguments: Any) -> Any:
    """Apply ``change`` to the tensors, at any depth, of arguments of equal structure."""
    first = arguments[0]
    if isinstance(first, Tensor):
        return change(*arguments)
    if isinstance(first, dict):
        return {name: mapped(change, *(values[name] for values in arguments)) for name in first}
    if isinstance(first, (list, tuple)):
        return type(first)(mapped(change, *values) for values in zip(*arguments, strict=True))
    return first


def usable(arguments: Any) -> Any:
    """The arguments with tensors created in inference mode copied."""
    return mapped(lambda value: value.clone() if value.is_inference() else value, arguments)


@dataclass(eq=False)
class Draw:
    """One call of the pipeline, seen from its denoiser.

    Rows with an active guidance get the corrected prediction in both halves of the classifier-free
    batch: ``u + s·(c − u)`` returns it unchanged in any precision; multistep schedulers keep it.
    """

    pipe: Any
    family: Family
    call: Mapping[str, Any]  # arguments of the pipeline call by name, defaults included
    guidances: Sequence[Guidance]
    decoder: Decoder
    trace: list[dict[str, Tensor]] = field(default_factory=list)
    last: Prediction | None = None  # of the latest step, as the guidances left it
    unmoved: bool = False  # whether the scheduler's last step does not follow the prediction
    finished: bool = False  # whether the denoiser was called for the schedule's last step
    latents: Tensor | None = None  # as they were prepared
    # Latents (B, C, h, w) of the given image if an inpainting pipeline restores them after each
    # step; None if the denoiser sees them or there are none.
    given: Tensor | None = None
    # (B, 1, h, w), twice with both branches: what that pipeline draws (1) or restores (0).
    mask: Tensor | None = None
    finite_images: Tensor | None = None  # (n,) bool, of the latest output

    def __post_init__(self) -> None:
        self.levels = NoiseLevels(self.pipe.scheduler, self.family.flow)
        self._memory: dict[Any, Any] = {}
        self._like: Tensor | None = None
        self._randomness = OwnRandomness()
        self._ended = False
        self._images = image_count(self.call) if self.call else None
        known = getattr(diffusers, self.family.model)
        needed = (self.family.sample, "timestep", "encoder_hidden_states")
        self._signature = Signature(self.denoiser, known, needed)
        self._check_cache: CacheCheck | None = None
        self._positional = 0  # how many arguments the pipeline gives its denoiser without a name

    @property
    def denoiser(self) -> Any:
        """The pipeline's denoiser."""
        return getattr(self.pipe, self.family.denoiser)

    @contextmanager
    def hooked(self, before: Before | None = None) -> Iterator[None]:
        """Hook ``before`` and ``after`` into the pipeline's own call."""
        if any(getattr(guidance, "calls_denoiser", True) for guidance in self.guidances):
            self._check_cache = CacheCheck(self.denoiser)
        with hooked(self.denoiser, self.after, before):
            yield
        if self.guidances:
            self.levels.check_followed(bool(getattr(self.pipe, "interrupt", False)))

    def callbacks_aside(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with callbacks run unguarded; these must not replace pipeline parts."""
        parts = {name: getattr(self.pipe, name) for name in (self.family.denoiser, "scheduler")}

        def check() -> None:
            for name, part in parts.items():
                if getattr(self.pipe, name) is not part:
                    raise ValueError(
                        f"memfree.guard: a callback replaced the {name} during the call, where the "
                        "guard cannot follow: replace it between calls"
                    )

        callbacks = {
            name: callback_aside(value, check)
            for name, value in call.items()
            if name.startswith("callback") and callable(value)
        }
        return {**call, **callbacks}

    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: the denoiser's output with active rows corrected."""
        try:
            with torch.inference_mode(False), torch.no_grad():
                arguments = usable(self.bound(args, kwargs))
                raw = usable(output[0] if isinstance(output, tuple) else output.sample)
                planned = getattr(self.pipe, "num_timesteps", None)
                level = self.levels.next(arguments["timestep"], planned)
                self.finished = level.is_last
                if level.step == 0 and self._check_cache is not None:
                    self._check_cache()
                view = self.view(arguments, level)
                correction = self.guided(view, raw)
        except ValueError:
            if self.guidances:
                raise
            self.last = None  # a call without guidance need not be followed
            return None
        if correction is None:
            return None
        rows, corrected = correction
        changed = raw.clone()
        target = self.family.prediction(changed, view.channels)
        for half in range(0, view.total, view.count):
            target[rows + half] = corrected
        return (changed, *output[1:]) if isinstance(output, tuple) else type(output)(sample=changed)

    def encode(self, captions: Sequence[str]) -> TextConditions:
        """Encode captions like this call's prompts; guidances cache results by this function."""
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
        """The denoiser's arguments by name."""
        self._positional = len(args)
        return self._signature.bind(args, kwargs)

    def as_called(self, arguments: Arguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments by position and by name, as the pipeline passes them."""
        return self._signature.unbind(arguments, self._positional)

    def view(self, arguments: Arguments, level: NoiseLevel) -> View:
        """The denoiser's call as guidances see it."""
        scale = getattr(self.pipe, "guidance_scale", self.call.get("guidance_scale", 1.0))
        twice = bool(getattr(self.pipe, "do_classifier_free_guidance", scale > 1))
        total = len(arguments[self.family.sample])
        if self._images is not None and total != (expected := self._images * (1 + twice)):
            raise ValueError(
                f"memfree.guard: {type(self.pipe).__name__} calls its denoiser with a batch of "
                f"{total}, where {self._images} images with guidance_scale {float(scale):g} are "
                f"{expected}: the guard needs both branches of classifier-free guidance in one "
                "batch, and all images"
            )
        return View(self, arguments, level, float(scale) if twice else 1.0, twice)

    def own_randomness(
        self, part: str, drawing: Sequence[Any], stream: OwnRandomness | None = None
    ) -> AbstractContextManager[None]:
        """Let guard parts draw without moving torch's generators; third-party code may draw too."""
        stream, device = stream or self._randomness, self.pipe._execution_device
        if all(type(own).__module__.startswith("memfree.") for own in drawing):
            return stream.if_drawn(device, self.decoder.draws, part)
        return stream.on(device)

    def guided(self, view: View, raw: Tensor) -> tuple[Tensor, Tensor] | None:
        """Corrected rows and their prediction, if any; ``raw``: all halves as returned."""
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
            decoder.explained("guiding", view.count),
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

    def _ends(self, view: View, base: Prediction) -> bool:
        if len(view.level.following) == 1:
            self._ended = LastStep(*self._step_of(view, base)).is_last()
            return self._ended
        return view.level.is_last and not self._ended

    def _step_of(self, view: View, base: Prediction) -> tuple[Any, ...]:
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

    def _inpainted(self, base: Prediction) -> Prediction:
        assert self.given is not None and self.mask is not None
        # Like the pipeline, use the first half of both branches' mask.
        drawn, given = self.mask[: len(base.x_t)].float(), self.given.float()
        offset, gain = base.returned or (torch.zeros_like(base.x_t, dtype=torch.float32), 1.0)
        known = drawn * offset + (1 - drawn) * given, (gain * drawn).expand_as(offset)
        if (finish := base.finish) is None:
            return replace(base, returned=known)
        return replace(
            base, returned=known, finish=lambda x_0: drawn * finish(x_0) + (1 - drawn) * given
        )


def _numbers(values: Tensor) -> Tensor:
    """0 for NaN and ∞, which have no neighbours."""
    return values.nan_to_num(0.0, 0.0, 0.0)


def _decoded(decode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda latents: _numbers(decode(latents))


def _in_numbers(prediction: Prediction) -> Prediction:
    """One broken sample, left uncorrected, must not end the call."""
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
    n = √((1−σ)² + σ²), x_t/n is, with √ᾱ = (1−σ)/n, and n·v + (1−2σ)·x_t/n is its v prediction √ᾱ·ε
    − √(1−ᾱ)·x_0. Guidances see that; their change is divided by n on the way back.
    """

    draw: Draw
    arguments: Arguments
    level: NoiseLevel
    scale: float  # s_0; 1 without classifier-free guidance
    twice: bool  # whether the batch holds an unconditional half, before the conditional one
    x_t: Tensor = field(init=False)  # (B, C, h, w), variance preserving
    conditions: TextConditions = field(init=False)  # of the conditional half

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
        """The prediction type that guidances see."""
        if self.level.flow_sigma is not None:
            return "v_prediction"
        kind: PredictionType = self.draw.pipe.scheduler.config.prediction_type
        return kind

    def from_native(self, output: Tensor, x_t: Tensor | None = None) -> Tensor:
        """The model's prediction as guidances see it; ``x_t``: its samples, if not this call's."""
        if self.level.flow_sigma is None:
            return output
        samples = self.x_t if x_t is None else x_t
        return self.norm * output.float() + (1 - 2 * self.level.flow_sigma) * samples.float()

    def native(self, prediction: Prediction) -> Tensor:
        """The combined prediction in the model's own terms: v for flow matching."""
        if self.level.flow_sigma is None:
            return prediction.output
        shift = (1 - 2 * self.level.flow_sigma) * self.x_t.float()
        return (prediction.output - shift) / self.norm

    def to_native(self, corrected: Tensor, before: Tensor, native: Tensor, rows: Tensor) -> Tensor:
        """The corrected denoiser output for some rows: the inverse of ``from_native``."""
        if self.level.flow_sigma is None:
            return corrected.to(native.dtype)
        uncond, cond = native.chunk(2) if self.twice else (None, native)
        combined = combine(cond, uncond, self.scale)[rows].float()
        return (combined + (corrected - before) / self.norm).to(native.dtype)

    def denoise(self, x: Tensor, conditions: Conditions | None) -> Tensor:
        """Run the denoiser at this step for rows of x_t; calling ``forward`` triggers no hook."""
        if conditions is None and not self.twice:
            raise ValueError(
                "memfree.guard: this guidance needs the unconditional prediction, which the "
                "pipeline makes with a guidance_scale above 1 only, and never with a denoiser that "
                "is told the scale"
            )
        rows = self._rows(x)
        half = rows if conditions is None else rows + (self.total - self.count)
        family = self.draw.family

        def rows_of(value: Tensor) -> Tensor:
            return value[half.to(value.device)] if value.shape[:1] == (self.total,) else value

        arguments = mapped(rows_of, self.arguments)
        sample = (x * self.norm).to(self.dtype)
        beside = arguments[family.sample][:, self.channels :]
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
        """Each row of x_t has its own arguments (sizes, image prompts)."""
        if len(x) == self.count:
            return torch.arange(self.count, device=x.device)
        same = (x.detach()[:, None] == self.x_t[None]).flatten(2).all(dim=2)
        # A sample that is not a row of x_t takes the first row's arguments.
        return same.float().argmax(dim=1)
