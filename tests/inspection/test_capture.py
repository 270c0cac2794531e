"""What inspect collects: the very masks of the run, and files that are whole."""

import io
from pathlib import Path

import numpy as np
import pytest

from unisparse_np import BackendUnavailable, InvalidInput, unisparse_attention
from unisparse_np.inspection import capture as capture_module
from unisparse_np.inspection.capture import Capture, capture
from unisparse_np.inspection.density_table import densities_as_dict, density_table
from unisparse_np.inspection.files import as_npz, check_file, check_folder, write_whole
from unisparse_np.inspection.pictures import check_matplotlib, draw_pictures, mask_image
from unisparse_np.inspection.reasons import Reason
from unisparse_np.inspection.walkthrough import walk

from .small import CONFIG, model_and_tokenizer, token_ids


@pytest.fixture(scope="module")
def captured() -> Capture:
    return capture(model_and_tokenizer()[0], token_ids(), CONFIG, label="a label", chunk_size=64)


def test_masks_and_scores_are_those_of_the_run(captured: Capture) -> None:
    found = {}

    def observe(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, trace: object) -> None:
        found[layer] = unisparse_attention(q, k, v, CONFIG, return_trace=True)[1]

    model = model_and_tokenizer()[0]
    cache = model.new_cache(len(token_ids()))
    model.prefill(token_ids(), cache, CONFIG, observer=observe)
    for layer, seen in captured.layers.items():
        np.testing.assert_array_equal(seen.kept, found[layer].mask)
        np.testing.assert_allclose(seen.scores, found[layer].mean, atol=1e-5)
    assert [layer.densities.mean() for layer in captured.layers.values()] == pytest.approx(model.layer_densities(cache))


def test_one_row_is_what_the_walk_through_it_shows(captured: Capture) -> None:
    walked = walk(model_and_tokenizer()[0], token_ids(), CONFIG, layer=2, head=1, block=4)
    layer = captured.layers[2]
    np.testing.assert_array_equal(layer.reasons[1, 4, :5], walked.reasons)
    np.testing.assert_allclose(layer.scores[1, 4, :5], walked.scores, atol=1e-6)
    assert layer.true_mass is not None
    np.testing.assert_allclose(layer.true_mass[1, 4, :5], walked.true_mass, atol=1e-5)
    assert not layer.scores[:, 0, 1:].any() and not layer.reasons[:, 0, 1:].any()


def test_only_the_layers_asked_for() -> None:
    model = model_and_tokenizer()[0]
    found = capture(model, token_ids()[:64], ["dense", CONFIG, CONFIG, CONFIG], layers=[-1, 1], with_truth=False)
    assert list(found.layers) == [1, 3] and found.layers[1].true_mass is None
    with pytest.raises(InvalidInput, match="--layer 0 is dense"):
        capture(model, token_ids()[:64], ["dense", CONFIG, CONFIG, CONFIG], layers=[0])
    with pytest.raises(InvalidInput, match="--layer 9 is out of range"):
        capture(model, token_ids()[:64], CONFIG, layers=[9])


def test_more_than_fits_memory_is_refused_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "MOST_BYTES", 1000)
    with pytest.raises(InvalidInput, match="choose some layers with --layer"):
        capture(model_and_tokenizer()[0], token_ids(), CONFIG)


def test_npz_holds_every_array(captured: Capture) -> None:
    with np.load(io.BytesIO(as_npz(captured, token_ids()))) as arrays:
        np.testing.assert_array_equal(arrays["token_ids"], token_ids())
        np.testing.assert_array_equal(arrays["layer_3_kept"], captured.layers[3].kept)
        np.testing.assert_array_equal(arrays["layer_3_true_mass"], captured.layers[3].true_mass)
        assert len(arrays.files) == 1 + 4 * 4


def test_pictures_are_png_one_a_layer(captured: Capture) -> None:
    pictures = draw_pictures(captured, len(token_ids()))
    assert list(pictures) == ["density.png", *(f"layer_{n:02}.png" for n in range(4))]
    assert all(png.startswith(b"\x89PNG") and len(png) > 5000 for png in pictures.values())


def test_a_mask_picture_tells_the_reasons_apart() -> None:
    reasons = np.array(
        [[Reason.DIAGONAL, 0, 0], [Reason.SINK | Reason.TOP_P, Reason.DIAGONAL, 0], [0, Reason.TOP_P, Reason.DIAGONAL]], np.uint8
    )
    colours = {tuple(colour) for colour in mask_image(reasons).reshape(-1, 3)}
    assert len(colours) == 5  # diagonal, sink, Top-P, dropped, future
    np.testing.assert_array_equal(mask_image(reasons)[0, 1], [1, 1, 1])


def test_the_table_has_a_line_a_layer(captured: Capture) -> None:
    lines = density_table(captured).splitlines()
    assert lines[0].endswith("a label") and len(lines) == 2 + 4 + 1
    assert lines[3].split() == [
        "1",
        f"{100 * captured.layers[1].densities.mean():.1f}",
        *(f"{100 * d:.0f}" for d in captured.layers[1].densities),
    ]
    values = densities_as_dict(captured)
    assert len(values["layers"]["3"]) == 8 and values["density"] == pytest.approx(np.mean(list(values["layers"].values())))


def test_files_are_checked_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"does not end in \.html: name it so"):
        check_file("--html", str(tmp_path / "report.txt"), ".html")
    with pytest.raises(InvalidInput, match=r"--html: the folder .*nowhere does not exist: make it first"):
        check_file("--html", str(tmp_path / "nowhere" / "report.html"), ".html")
    with pytest.raises(InvalidInput, match=r"--png: the folder .*nowhere does not exist"):
        check_folder("--png", str(tmp_path / "nowhere"))
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InvalidInput, match="is a folder: name a file in it"):
        check_file("--html", str(tmp_path / "folder.html"), ".html")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    target.write_bytes(b"old")

    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InvalidInput, match="No space left on device"):
        write_whole(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"] and target.read_bytes() == b"old"


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'unisparse-np\[plot\]'"):
        check_matplotlib()
