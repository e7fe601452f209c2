"""Images that prompts bring: where they are looked for, what is refused, how they are opened."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from sfgrpo import prompts
from sfgrpo.prompts import Prompt, images

ONE, SOME = range(1, 2), range(4)


def picture(path: Path, size: tuple[int, int] = (6, 4), colour: str = "red", **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **how)
    return path


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_paths_start_from_the_file_that_names_them(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "cats" / "1.png")
    far = picture(tmp_path / "far.png")
    rows = {"prompt": "a", "image": "cats/1.png", "n": 1}, {"prompt": "b", "image": str(far)}
    source = lines(tmp_path / "set" / "edits.jsonl", *rows)
    found = prompts.split(source, pictures=ONE).train
    near = str(tmp_path / "set" / "cats" / "1.png")
    assert [p.images for p in found] == [(near,), (str(far),)]
    # What rewards and judges see.
    assert [p.metadata for p in found] == [{"image": near, "n": 1}, {"image": str(far)}]


def test_models_without_images_leave_them_to_rewards(tmp_path: Path) -> None:
    row = {"prompt": "a", "image": "is/not/there.png"}
    source = lines(tmp_path / "a.jsonl", row)
    assert prompts.split(source).train == [Prompt("a", {"image": "is/not/there.png"})]
    assert prompts.split(source).train[0].images == ()


def test_several_images_of_a_prompt(tmp_path: Path) -> None:
    for name in "12":
        picture(tmp_path / f"{name}.png")
    rows = {"prompt": "a", "image": ["2.png", "1.png"]}, {"prompt": "b"}
    found = prompts.split(lines(tmp_path / "a.jsonl", *rows), pictures=SOME).train
    both = [str(tmp_path / "2.png"), str(tmp_path / "1.png")]
    assert [list(p.images) for p in found] == [both, []]
    assert [p.metadata for p in found] == [{"image": both}, {}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "b"}, "this backbone takes 1 image with a prompt, under 'image', got none"),
        ({"prompt": "b", "image": ["1.png", "1.png"]}, "takes 1 image .* got 2"),
        ({"prompt": "b", "image": 3}, "'image' must be a path or a list of paths, got 3"),
        ({"prompt": "b", "image": ["1.png", 3]}, "must be a path or a list of paths"),
        ({"prompt": "b", "image": "2.png"}, r"there is no image '.*2\.png'"),
        ({"prompt": "b", "image": "text.png"}, r"image '.*text\.png' cannot be read"),
        ({"prompt": "b", "image": "half.png"}, r"image '.*half\.png' cannot be read"),
        ({"prompt": "b", "image": "half.jpg"}, r"image '.*half\.jpg' cannot be read"),
        ({"prompt": "b", "image": "data:image/png;base64,%"}, "image 'data:.*' cannot be read"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_row(
    tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "text.png").write_text("not a picture")
    for name in ("half.png", "half.jpg"):
        whole = picture(tmp_path / name, (64, 64)).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) * 3 // 4])
    source = lines(tmp_path / "a.jsonl", {"prompt": "a", "image": "1.png"}, row)
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: .*{said}") as refused:
        prompts.split(source, pictures=ONE)
    assert "\n" not in str(refused.value)


def test_evaluation_brings_images_too(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    train = lines(tmp_path / "a.jsonl", {"prompt": "a", "image": "1.png"})
    shown = lines(tmp_path / "b.jsonl", {"prompt": "b", "image": "1.png"})
    found = prompts.split(train, prompts_from=shown, pictures=ONE)
    assert found.evaluation[0].images == (str(tmp_path / "1.png"),)
    blind = lines(tmp_path / "c.jsonl", {"prompt": "c"})
    with pytest.raises(ValueError, match=r"c\.jsonl, line 1: .*got none"):
        prompts.split(train, prompts_from=blind, pictures=ONE)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("place", ["saved", "file.parquet"])
def test_bytes_of_a_dataset(tmp_path: Path, place: str, several: bool) -> None:
    """Embedded bytes become a URL in the metadata, which rewards on other machines see, too."""
    data = picture(tmp_path / "1.png", (5, 7), "blue").read_bytes()
    (tmp_path / "1.png").unlink()
    stored = {"bytes": data, "path": None}
    kind: Any = datasets.List(datasets.Image()) if several else datasets.Image()
    table = datasets.Dataset.from_dict(
        {"prompt": ["a", "b"], "image": [[stored, stored] if several else stored] * 2},
        features=datasets.Features({"prompt": datasets.Value("string"), "image": kind}),
    )
    source = tmp_path / place
    table.to_parquet(source) if place.endswith("parquet") else table.save_to_disk(source)
    found = prompts.split(str(source), pictures=SOME).train
    for prompt in found:
        assert len(prompt.images) == (2 if several else 1)
        assert prompt.metadata["image"] == (list(prompt.images) if several else prompt.images[0])
        assert prompt.images[0].startswith("data:image/png;base64,")
        assert images.opened(prompt.images[0]).size == (5, 7)
    json.dumps([p.metadata for p in found])


def test_a_folder_of_images_and_captions(tmp_path: Path) -> None:
    rows = [{"file_name": f"{n}.png", "text": f"number {n}"} for n in (1, 2)]
    for n in (1, 2):
        picture(tmp_path / "set" / f"{n}.png", (n, n))
    lines(tmp_path / "set" / "metadata.jsonl", *rows)
    found = prompts.split(str(tmp_path / "set"), pictures=ONE).train
    assert [images.opened(p.images[0]).size for p in found] == [(1, 1), (2, 2)]


def test_images_are_opened_upright_in_three_channels(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[images.ORIENTATION] = 6
    lying = picture(tmp_path / "a.jpg", (64, 16), exif=turned)
    grey = tmp_path / "b.png"
    Image.new("LA", (3, 2)).save(grey)
    for path, size in ((lying, (16, 64)), (grey, (3, 2))):
        opened = images.opened(str(path))
        assert (opened.mode, opened.size, images.size(str(path))) == ("RGB", size, size)


def test_content_is_that_of_the_file(tmp_path: Path) -> None:
    one, two = picture(tmp_path / "1.png"), picture(tmp_path / "2.png")
    other = picture(tmp_path / "3.png", colour="green")
    inline = images.inline({"bytes": one.read_bytes(), "path": None})
    assert images.content(str(one)) == images.content(str(two)) == images.content(inline)
    assert images.content(str(other)) != images.content(str(one))
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "webp")
    assert images.inline({"bytes": buffer.getvalue(), "path": "x"}).startswith("data:image/webp;")
    assert images.inline({"bytes": None, "path": "x.png"}) == "x.png"


def test_a_run_knows_its_images_by_what_they_hold(tmp_path: Path) -> None:
    """Another place of the same files is the same prompts, as for ranks on several machines; other
    pixels under the same name are not."""
    found = []
    for place, colour in (("here", "red"), ("there", "red"), ("other", "blue")):
        picture(tmp_path / place / "1.png", colour=colour)
        source = lines(tmp_path / place / "a.jsonl", {"prompt": "a", "image": "1.png"})
        found.append(prompts.fingerprint(prompts.split(source, pictures=ONE)))
    assert found[0] == found[1] != found[2]
