"""Credit put together by hand, under every rule, and what must not change it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmray.rlhf.advantages import gae, grpo_advantages, rloo_advantages, whiten
from fmray.rlhf.credit import Credit, CreditRules, credit
from fmray.rlhf.kl import kl_estimate
from tests.unit.rlhf.batches import Batch, drawn_batch

KINDS = ("gae", "grpo", "rloo", "reinforce++")


def credited(batch: Batch, rules: CreditRules, kl_coefficient: float = 0.1) -> Credit:
    if rules.advantage != "gae":
        arguments = batch.arguments()
        return credit(*arguments[:4], None, *arguments[5:], rules, kl_coefficient)
    return credit(*batch.arguments(), rules, kl_coefficient)


def test_6_12_each_token_pays_its_kl_and_one_place_has_the_score() -> None:
    batch = drawn_batch(6, 7, 0)
    found = credited(batch, CreditRules(), 0.25)
    kl = kl_estimate(batch.old_logp_BT, batch.reference_logp_BT).where(batch.mask_BT, 0)
    assert torch.equal(found.kl_BT, kl)
    without_kl = found.rewards_BT + 0.25 * kl
    for row, length in enumerate(batch.mask_BT.sum(dim=1).tolist()):
        expected = torch.zeros(7, dtype=torch.float64)
        expected[length - 1] = batch.scores_B[row]
        assert torch.allclose(without_kl[row], expected, atol=1e-12)


def test_kl_in_the_loss_leaves_the_reward_alone_and_is_still_measured() -> None:
    batch = drawn_batch(6, 7, 1)
    found = credited(batch, CreditRules(kl="k3", kl_in="loss"), 0.25)
    assert torch.allclose(found.rewards_BT.sum(dim=1), batch.scores_B)
    assert (found.kl_BT[batch.mask_BT] > 0).all()


def test_6_11_missing_eos_is_a_penalty_or_a_fixed_score() -> None:
    batch = drawn_batch(8, 5, 2)
    cut = ~batch.ended_B
    assert cut.any()
    assert batch.ended_B.any()
    penalised = credited(batch, CreditRules(missing_eos=("penalty", 1.5))).scores_B
    assert torch.allclose(penalised, batch.scores_B - 1.5 * cut)
    replaced = credited(batch, CreditRules(missing_eos=("replace", -1.0))).scores_B
    assert torch.equal(replaced[cut], torch.full_like(replaced[cut], -1.0))
    assert torch.equal(replaced[batch.ended_B], batch.scores_B[batch.ended_B])
    assert torch.equal(credited(batch, CreditRules()).scores_B, batch.scores_B)


def test_6_14_defaults_are_the_papers() -> None:
    rules = CreditRules()
    assert (rules.gamma, rules.lam, rules.whiten_rewards, rules.whitens_advantages) == (
        1.0,
        0.95,
        False,
        True,
    )
    assert (rules.kl, rules.kl_in, rules.score_at, rules.whiten_scope) == ("k1", "reward", "last", "global")


def test_6_14_rewards_are_whitened_around_their_mean_before_gae() -> None:
    batch = drawn_batch(6, 7, 3)
    plain = credited(batch, CreditRules())
    found = credited(batch, CreditRules(whiten_rewards=True))
    seen = whiten(plain.rewards_BT, batch.mask_BT, shift_mean=False)
    advantages, returns = gae(seen, batch.values_BT, batch.mask_BT, 1.0, 0.95)
    assert found.returns_BT is not None
    assert torch.allclose(found.returns_BT, returns, atol=1e-12)
    assert torch.allclose(found.advantages_BT, whiten(advantages, batch.mask_BT), atol=1e-12)
    assert torch.equal(found.rewards_BT, plain.rewards_BT), "what is logged is not whitened"


@pytest.mark.parametrize("whitened", [True, False])
def test_6_15_returns_do_not_depend_on_whitening(whitened: bool) -> None:
    batch = drawn_batch(6, 7, 4)
    found = credited(batch, CreditRules(whiten_advantages=whitened))
    advantages, returns = gae(found.rewards_BT, batch.values_BT, batch.mask_BT, 1.0, 0.95)
    assert found.returns_BT is not None
    assert torch.equal(found.returns_BT, returns)
    expected = whiten(advantages, batch.mask_BT) if whitened else advantages
    assert torch.allclose(found.advantages_BT, expected, atol=1e-12)


@settings(max_examples=30)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(["k1", "k2", "k3"]),
    st.booleans(),
    st.integers(0, 999),
    st.integers(1, 5),
)
def test_6_15_padding_order_and_filler_change_nothing(
    kind: str, kl: str, whiten_rewards: bool, seed: int, columns: int
) -> None:
    rules = CreditRules(advantage=kind, kl=kl, whiten_rewards=whiten_rewards)  # type: ignore[arg-type]
    batch = drawn_batch(7, 6, seed)
    plain = credited(batch, rules)
    assert (plain.advantages_BT[~batch.mask_BT] == 0).all()
    padded = credited(batch.padded(columns), rules)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    permuted = credited(batch.rows(order), rules)
    filler = drawn_batch(2, 6, seed + 1)
    filler = Batch(**{**vars(filler), "mask_BT": torch.zeros(2, 6, dtype=torch.bool)})
    filler = Batch(**{**vars(filler), "scores_B": torch.full((2,), torch.nan, dtype=torch.float64)})
    both = Batch(*(torch.cat(pair) for pair in zip(batch.arguments(), filler.arguments(), strict=True)))
    filled = credited(both, rules)
    assert (filled.advantages_BT[7:] == 0).all()
    assert filled.sums().means() == pytest.approx(plain.sums().means(), abs=1e-12)
    for name in ("rewards_BT", "advantages_BT", "returns_BT", "kl_BT"):
        value = getattr(plain, name)
        if value is not None:
            assert torch.allclose(getattr(padded, name)[:, :6], value, atol=1e-10), name
            assert (getattr(padded, name)[:, 6:] == 0).all(), name
            assert torch.allclose(getattr(permuted, name), value[order], atol=1e-10), name
            assert torch.allclose(getattr(filled, name)[:7], value, atol=1e-10), name


def test_grpo_and_rloo_compare_whole_rewards_and_give_every_token_the_same() -> None:
    batch = drawn_batch(6, 7, 5)
    for rules, function in (
        (CreditRules(advantage="grpo"), grpo_advantages),
        (CreditRules(advantage="rloo"), rloo_advantages),
    ):
        found = credited(batch, rules)
        expected = function(found.rewards_BT.sum(dim=1), batch.group_B)
        assert torch.allclose(found.advantages_BT, expected.unsqueeze(1) * batch.mask_BT, atol=1e-12)
        assert found.returns_BT is None


def test_one_place_more_for_the_critic_and_the_score_behind_the_last_token() -> None:
    batch = drawn_batch(5, 6, 6)
    found = credited(batch, CreditRules(score_at="after_last", value_mask="plus_one"), 0.0)
    for row, length in enumerate(batch.mask_BT.sum(dim=1).tolist()):
        place = min(length, 5)
        assert found.rewards_BT[row].nonzero().flatten().tolist() == [place]
        assert int(found.value_mask_BT[row].sum()) == min(length + 1, 6)
        assert int(found.policy_mask_BT[row].sum()) == length


def test_the_first_token_left_out() -> None:
    batch = drawn_batch(5, 6, 7)
    found = credited(batch, CreditRules(skip_first_token=True))
    assert not found.policy_mask_BT[:, 0].any()
    assert torch.equal(found.policy_mask_BT[:, 1:], batch.mask_BT[:, 1:])
    shorter = Batch(*(x[:, 1:] if x.ndim == 2 else x for x in batch.arguments()))
    expected = credited(shorter, CreditRules())
    for name in ("rewards_BT", "advantages_BT", "returns_BT", "kl_BT"):
        assert torch.allclose(getattr(found, name)[:, 1:], getattr(expected, name), atol=1e-12), name
        assert (getattr(found, name)[:, 0] == 0).all(), name


def test_6_19_sums_of_a_batch_are_those_of_its_parts() -> None:
    batch = drawn_batch(6, 7, 8)
    rules = CreditRules(advantage="grpo", missing_eos=("penalty", 1.0))
    whole = credited(batch, rules).sums()
    parts = credited(batch.rows(slice(0, 3)), rules).sums() + credited(batch.rows(slice(3, 6)), rules).sums()
    assert parts.means() == pytest.approx(whole.means(), abs=1e-12)
    means = whole.means()
    assert means["rlhf_reward"] == pytest.approx(means["score"] - 0.1 * means["kl"])
    assert means["length"] == batch.mask_BT.sum().item() / 6


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"gamma": 1.5}, "gamma=1.5"),
        ({"lam": -0.1}, "lam=-0.1"),
        ({"kl_clamp": 0.0}, "kl_clamp=0.0"),
        ({"kl_in": "loss"}, "use k2 or k3"),
        ({"score_at": "after_last"}, "value_mask='plus_one'"),
        ({"advantage": "rloo", "value_mask": "plus_one"}, "no critic"),
        ({"advantage": "reinforce++", "whiten_advantages": False}, "reinforce"),
    ],
)
def test_rules_that_contradict_each_other_are_refused(keys: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CreditRules(**keys)  # type: ignore[arg-type]


def test_batches_that_cannot_be_credited_are_refused() -> None:
    batch = drawn_batch(3, 5, 9)
    with pytest.raises(ValueError, match="needs a critic"):
        credit(*batch.arguments()[:4], None, *batch.arguments()[5:], CreditRules(), 0.1)
    left_padded = Batch(**{**vars(batch), "mask_BT": torch.tensor([[0, 1, 1, 1, 1]] * 3)})
    with pytest.raises(ValueError, match="padding behind"):
        credited(left_padded, CreditRules())
    single = Batch(**{**vars(batch), "mask_BT": torch.tensor([[1, 0, 0, 0, 0]] * 3)})
    with pytest.raises(ValueError, match="skip_first_token"):
        credited(single, CreditRules(skip_first_token=True))
