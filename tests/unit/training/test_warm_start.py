"""The ridge start: normal equations against torch's least squares, and the same on any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fmray.config.schema import DataConfig
from fmray.data.loader import PairDataset
from fmray.models.clip import DualEncoder
from fmray.runtime.context import WorkerContext
from fmray.runtime.run_folder import RunFolder
from fmray.training.warm_start import solve_ridge, start_at_ridge
from fmray.types import ImageText
from tests.tiny import tiny_config
from tests.unit.data.test_loader import Shades


def test_normal_equations_solve_the_penalised_least_squares() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 7, generator=draw, dtype=torch.float64) + 3
    y = torch.randn(40, 2, generator=draw, dtype=torch.float64) - 1
    one_x = torch.cat([torch.ones(40, 1, dtype=torch.float64), x], 1)
    weight, bias = solve_ridge(one_x.T @ torch.cat([one_x, y], 1), 7, strength=0.3)
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    penalty = 0.3 * 40 * centred_x.var(0, unbiased=False).mean()
    stacked_x = torch.cat([centred_x, penalty.sqrt() * torch.eye(7, dtype=torch.float64)])
    expected = torch.linalg.lstsq(
        stacked_x, torch.cat([centred_y, torch.zeros(7, 2, dtype=torch.float64)])
    ).solution
    assert torch.allclose(weight, expected, atol=1e-10)
    assert torch.allclose(x.mean(0) @ weight + bias, y.mean(0), atol=1e-10)


class ShadeTokenizer:
    """One token per shade, for pictures of `Shades`; takes what Hugging Face's tokenizers take."""

    pad_token_id = 0

    def __call__(self, text: list[str], **options: object) -> dict[str, object]:
        ids = [[1 + int(line.split()[1]) % 40, 2] for line in text]
        if options.get("return_tensors") != "pt":
            return {"input_ids": ids}

        class Encoded(dict[str, torch.Tensor]):
            def to(self, device: torch.device) -> Encoded:
                return self

        return Encoded(input_ids=torch.tensor(ids), attention_mask=torch.ones(len(ids), 2, dtype=torch.long))


def test_pictures_start_near_their_captions() -> None:
    torch.manual_seed(0)
    config = tiny_config()
    config.vision_projection = "affine"
    model = DualEncoder(config)
    data, tokenizer = DataConfig(batch_size=4), ShadeTokenizer()
    dataset = PairDataset(Shades(20), tokenizer, data, model.image, seed=0)
    context = WorkerContext(0, 1, torch.device("cpu"), RunFolder("unused"))
    pixels, _ = dataset.plain_rows(list(range(20)))
    encoded = tokenizer([f"shade {i}" for i in range(20)], return_tensors="pt")
    text = model.eval().encode_text(encoded["input_ids"], encoded["attention_mask"])  # type: ignore[arg-type]
    before = (model.encode_image(pixels) * text).sum(1).mean()
    start_at_ridge(model, tokenizer, dataset, 0.01, "fp32", context)  # type: ignore[arg-type]
    after = (model.encode_image(pixels) * text).sum(1).mean()
    assert after > before + 0.2


@dataclass(frozen=True)
class Captioned:
    """Pictures of `Shades` with captions of one's own; picture i is shade i // times."""

    captions: tuple[tuple[str, ...], ...]
    times: int = 1

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> ImageText:
        return replace(Shades(99)[index // self.times], captions=self.captions[index])

    def name(self, index: int) -> str:
        return str(index)


def test_every_caption_of_a_picture_counts() -> None:
    """A picture with two captions starts where two pictures with one caption each would."""
    torch.manual_seed(0)
    config = tiny_config()
    config.vision_projection = "affine"
    model, tokenizer = DualEncoder(config), ShadeTokenizer()
    context = WorkerContext(0, 1, torch.device("cpu"), RunFolder("unused"))
    pairs = tuple((f"shade {i}", f"shade {3 * i + 1}") for i in range(10))
    found = []
    for source in (Captioned(pairs), Captioned(tuple((c,) for pair in pairs for c in pair), times=2)):
        dataset = PairDataset(source, tokenizer, DataConfig(), model.image, seed=0)
        start_at_ridge(model, tokenizer, dataset, 0.1, "fp32", context)  # type: ignore[arg-type]
        found.append(model.vision_projection.weight.detach().clone())
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)
    assert found[0].abs().max() > 1e-3
