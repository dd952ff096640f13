"""The picture of a study: what is measured against the duplication factor."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from memfree.evaluation.plots import PRINTED_COLOURS
from memfree.manifest import write_atomic
from memfree.study.values import DISTANCES, RATES, Values

SUBJECTS = {
    "unguided": PRINTED_COLOURS[0],
    "amg": PRINTED_COLOURS[1],
    "multiplicity": PRINTED_COLOURS[4],
    "both": PRINTED_COLOURS[2],
    "reject": PRINTED_COLOURS[3],
    "oracle_steps": "#444444",
    "oracle_epochs": "#999999",
}
PANELS = ("copies", "duplicated_share", "frechet_pixels")


def write_dose_response(path: Path, values: Values, conditioning: str = "unconditional") -> bool:
    """Write a PNG with a panel a metric; nothing where fewer than two factors are known.

    Lines are means over training seeds, dots single seeds.

    Args:
        path: the file.
        values: what was measured, by key and training seed.
        conditioning: which models are drawn.

    Returns:
        Whether it was written.
    """
    factors = sorted({key[1] for key in values if key[0] == conditioning})
    if len(factors) < 2:
        return False
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        scale = 100 if metric in RATES else 1
        for subject, colour in SUBJECTS.items():
            known = {
                factor: [scale * one.value for one in values[key].values()]
                for factor in factors
                if (key := (conditioning, factor, subject, metric)) in values
            }
            if not known:
                continue
            style = "--" if subject.startswith("oracle") else "-"
            means = [sum(each) / len(each) for each in known.values()]
            label = subject.replace("_", ", equal ")
            axes.plot([*known], means, style, color=colour, linewidth=1.5, label=label)
            for factor, each in known.items():  # a dot a training seed
                axes.plot([factor] * len(each), each, ".", color=colour, markersize=5, alpha=0.6)
        axes.set_xscale("log", base=4)
        axes.set_xticks(factors, [str(factor) for factor in factors])
        axes.set_xlabel("records of a repeated image")
        axes.set_title({**RATES, **DISTANCES}[metric], loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        if metric in DISTANCES:
            axes.set_yscale("log")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False
    )
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
    return True
