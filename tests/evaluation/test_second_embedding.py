"""A second copy-detection embedding as the judge, and the refusal of the first one as its own."""

import pytest

from memfree.cli.entry import main
from memfree.evaluation.metrics import read_metrics

TINY = ["--size", "8", "--widths", "[8,8]", "--dimension", "8", "--steps", "40"]


@pytest.fixture(scope="module")
def embeddings(dataset, tmp_path_factory):
    root = tmp_path_factory.mktemp("embeddings")
    for seed in ("0", "1"):
        out = str(root / seed)
        main(["train-embedding", "--dataset", str(dataset), "--out", out, *TINY, "--seed", seed])
    return root


@pytest.fixture(scope="module")
def embedded_index(dataset, embeddings):
    out = embeddings / "index"
    options = ["--features", "copy_detection", "--extractor.path", str(embeddings / "0")]
    main(["index", "--dataset", str(dataset), "--out", str(out), *options])
    return out


def evaluate(dataset, index, samples, out, second):
    options = ["--dataset", dataset, "--index", index, "--out", out, "--second_embedding", second]
    options += ["--samples.unguided", samples["unguided"]]
    main(["evaluate", *map(str, options)])


def test_another_embedding_judges(dataset, embedded_index, embeddings, samples, tmp_path):
    evaluate(dataset, embedded_index, samples, tmp_path / "out", embeddings / "1")
    table = read_metrics(tmp_path / "out" / "metrics.json")
    second = table.get("second_copies", "unguided")
    assert second.detail["similarity"] == "copy-detection-cosine"
    first = table.get("copies", "unguided")
    assert second.detail["threshold"] != first.detail["threshold"]
    for name in ("precision_efficientnet", "recall_efficientnet", "vendi_efficientnet"):
        assert table.get(name, "unguided") and table.get(name, "heldout"), name
    for name in ("mirrored", "cropped_12", "jpeg_50", "blurred"):
        assert table.get(f"second_copies_of_{name}", "changed").count == 100


def test_the_guiding_embedding_is_refused(
    dataset, embedded_index, embeddings, samples, tmp_path, capsys
):
    with pytest.raises(SystemExit):
        evaluate(dataset, embedded_index, samples, tmp_path / "out", embeddings / "0")
    assert "is the embedding of --index" in capsys.readouterr().err
