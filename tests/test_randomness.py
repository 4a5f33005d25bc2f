"""ldm3d.randomness: what a volume draws depends on (seed, step, place), on nothing else."""

import pytest
import torch

from ldm3d.randomness import StepRandom

CPU = torch.device("cpu")


def draws(seed: int, step: int, count: int, rank: int = 0) -> list[torch.Tensor]:
    random = StepRandom(seed, step, count, CPU, rank)
    return [random.normal((3,)), random.uniform(), random.integers(2**40), torch.tensor(random.coins)]


def test_the_same_step_draws_the_same() -> None:
    for one, other in zip(draws(1, 2, 4), draws(1, 2, 4), strict=True):
        assert torch.equal(one, other)
    torch.rand(7)
    assert torch.equal(draws(1, 2, 4)[0], draws(1, 2, 4)[0])


def test_two_processes_with_half_the_batch_draw_what_one_draws() -> None:
    whole = draws(5, 3, 6)
    for one, two, both in zip(draws(5, 3, 3, rank=0), draws(5, 3, 3, rank=1), whole, strict=True):
        assert torch.equal(torch.cat([one, two]), both)


def test_volumes_steps_and_seeds_draw_differently() -> None:
    seen = {tuple(row) for seed in range(3) for step in range(20) for row in draws(seed, step, 3)[0].tolist()}
    assert len(seen) == 3 * 20 * 3


def test_numbers_are_distributed_as_they_should_be() -> None:
    random = StepRandom(0, 0, 2000, CPU)
    normal = random.normal((10,))
    assert normal.mean().item() == pytest.approx(0, abs=0.03) and normal.std().item() == pytest.approx(1, abs=0.03)
    assert random.uniform().mean().item() == pytest.approx(0.5, abs=0.03)
    assert set(random.integers(3).tolist()) == {0, 1, 2}
    assert sum(random.coins) / 2000 == pytest.approx(0.5, abs=0.05)
    assert random.normal().shape == random.uniform().shape == (2000,)


def test_libraries_that_draw_from_the_global_state_get_the_steps_own() -> None:
    def drawn(seed: int, step: int, rank: int) -> tuple[float, ...]:
        StepRandom(seed, step, 1, CPU, rank)
        return tuple(torch.rand(2).tolist())

    assert drawn(1, 2, 0) == drawn(1, 2, 0)
    assert len({drawn(seed, step, rank) for seed in range(4) for step in range(25) for rank in range(2)}) == 200


@pytest.mark.parametrize("seed", [2**31, 2**40, 2**63 - 1])
def test_large_seeds(seed: int) -> None:
    assert torch.equal(draws(seed, 5, 2)[0], draws(seed, 5, 2)[0])
    assert not torch.equal(draws(seed, 5, 2)[0], draws(seed, 6, 2)[0])
    assert not torch.equal(draws(seed, 5, 2)[0], draws(seed - 1, 5, 2)[0])
