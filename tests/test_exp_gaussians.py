"""experiments/gaussians.py against brute-force integration, a closed form and a search that knows no gradients."""

import json

import gaussians
import numpy as np
import pytest
import torch


def log_normal(x, mu, sd):
    return -(((x - mu) / sd) ** 2) / 2 - np.log(sd * np.sqrt(2 * np.pi))


def brute_force(mu, sd, alpha, means, sds, steps):
    """D_alpha, its entropy integrated too, with pi and pi_ref on one grid over x; mu and sd (rows,), result (rows,)."""
    x = mu[:, None] + sd[:, None] * np.linspace(-10, 10, steps)
    log_q = log_normal(x, mu[:, None], sd[:, None])
    log_p = np.logaddexp.reduce([log_normal(x, m, s) for m, s in zip(means, sds)]) - np.log(len(means))
    return ((alpha * log_q - log_p) * np.exp(log_q)).sum(1) * (x[:, 1] - x[:, 0])


def arrays(components, distance):
    return [t.numpy() for t in gaussians.mixture(components, distance)]


def test_d_alpha_equals_brute_force():
    """Wherever a fit can be: sd up to 3.5, mu in and around the mixture."""
    rng = np.random.default_rng(0)
    for components, distances in gaussians.DISTANCES.items():
        for distance in distances:
            means, sds = arrays(components, distance)
            mu, sd = rng.uniform(means[0] - 2, means[-1] + 2, 10), rng.uniform(0.05, 3.5, 10)
            for alpha in (0.0, 0.37, 1.0, 1.4):
                expected = brute_force(mu, sd, alpha, means, sds, 20_001)
                got = gaussians.d_alpha(torch.tensor(mu), torch.tensor(sd), alpha, *map(torch.tensor, (means, sds)))
                np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-8)


def test_kl_of_a_component_to_itself_far_from_the_others_is_ln_of_their_number():
    means, sds = gaussians.mixture(3, 30)
    for mu, sd in zip(means, sds):
        assert abs(gaussians.d_alpha(mu, sd, 1.0, means, sds).item() - np.log(3)) < 1e-12


@pytest.mark.parametrize("mean, width", [(0.0, 1.0), (-3.7, 0.4), (11.0, 2.5)])
def test_one_component(mean, width):
    """pi_ref = N(m, s): D_alpha = (sd^2 + (mu - m)^2) / (2 s^2) - alpha ln(sd) + ..., lowest at m and s sqrt(alpha)."""
    target = torch.tensor([[mean], [width]], dtype=torch.float64).unbind()
    grid = gaussians.search_grid(*target, fast=True)
    for alpha in (0.2, 0.6, 1.0, 1.3):
        mu, sd, value = gaussians.fit(alpha, *target, grid)
        expected = width * alpha**0.5
        assert abs(mu - mean) < 1e-6 * width
        assert abs(sd / expected - 1) < 1e-6
        lowest = alpha / 2 + np.log(width * np.sqrt(2 * np.pi)) - alpha * np.log(expected * np.sqrt(2 * np.pi * np.e))
        assert abs(value - lowest) < 1e-11


def test_a_point_where_there_is_no_entropy_term():
    mu, sd, value = gaussians.fit(0.0, *gaussians.mixture(2, 30), grid=None)
    assert (mu, sd) == (30.0, 0.0) and abs(value - np.log(2 * 0.8 * np.sqrt(2 * np.pi))) < 1e-12


@pytest.mark.parametrize("components, distance", [(2, 4), (2, 6), (3, 7), (4, 3)])
def test_no_random_restart_beats_the_global_search(components, distance):
    """40 points per alpha, each walking to whichever neighbour is lower, in steps that halve where none is."""
    rng = np.random.default_rng(components + distance)
    means, sds = arrays(components, distance)
    target = gaussians.mixture(components, distance)
    alphas = np.repeat([0.2, 0.6, 0.8, 1.0], 40)
    at = np.stack([rng.uniform(means[0], means[-1], len(alphas)), np.log(rng.uniform(0.1, 4, len(alphas)))])
    steps = np.full(len(alphas), 0.4)

    def value(at, count=401):
        return brute_force(at[0], np.exp(at[1]), alphas[:, None], means, sds, count)

    lowest = value(at)
    for _ in range(25):
        improved = np.zeros(len(alphas), bool)
        for direction in np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]):
            moved = at + direction[:, None] * steps
            there = value(moved)
            better = there < lowest
            at, lowest, improved = np.where(better, moved, at), np.where(better, there, lowest), improved | better
        steps = np.where(improved, steps, steps / 2)

    found, grid = value(at, 4001), gaussians.search_grid(*target, fast=True)
    for alpha in np.unique(alphas):
        _, _, global_minimum = gaussians.fit(float(alpha), *target, grid)
        walked = found[alphas == alpha].min()
        assert global_minimum <= walked + 1e-7
        # Else the walk was too short to say anything.
        assert walked - global_minimum < 1e-2


def test_place():
    means, sds = gaussians.mixture(2, 4)
    assert gaussians.place(0.1, 1.05, means, sds) == 0
    assert gaussians.place(4.0, 0.0, means, sds) == 1
    assert gaussians.place(4.3, 0.8, means, sds) == gaussians.place(4.0, 1.0, means, sds) == "neither"
    assert gaussians.place(2.0, 1.9, means, sds) == "covers"
    assert gaussians.place(2.0, 1.4, means, sds) == gaussians.place(5.0, 1.9, means, sds) == "neither"


def test_ends_on_highest():
    means, sds = gaussians.mixture(3, 5)
    covers, middle, narrowest = (3.0, 2.7, 0.0), (5.0, 0.7, 0.0), (10.0, 0.4, 0.0)
    thin, point = (10.0, 0.3, 0.0), (10.0, 0.0, 0.0)

    def ends(at_1, at_0_6, at_0_2, at_0=point):
        return gaussians.ends_on_highest({0.0: at_0, 0.2: at_0_2, 0.6: at_0_6, 1.0: at_1}, means, sds)

    assert ends(covers, narrowest, thin) and ends(covers, middle, thin) and ends(middle, narrowest, thin)
    assert not ends((10.0, 0.5, 0.0), narrowest, thin), "already there at alpha 1"
    assert not ends((-3.0, 2.7, 0.0), narrowest, thin), "neither at alpha 1"
    assert not ends(covers, narrowest, (5.0, 0.3, 0.0)), "leaves it again"
    assert not ends(covers, middle, (5.0, 0.3, 0.0)), "there at alpha 0 only"
    assert not ends(covers, thin, narrowest), "widens"


def verdicts(folder):
    gaussians.main(gaussians.Args(results=str(folder), fast=True))
    return {v["claim"]: v["holds"] for v in json.loads((folder / "gaussians.json").read_text())["verdicts"]}


def test_claims_hold(tmp_path):
    assert verdicts(tmp_path) == {1: True, 2: True}
    page = (tmp_path / "gaussians.md").read_text()
    for name in ("gaussians.png", "gaussians_map.png"):
        assert f"]({name})" in page
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_claims_do_not_hold_of_reverse_kl_whatever_alpha_is(tmp_path, monkeypatch):
    fit = gaussians.fit
    monkeypatch.setattr(gaussians, "fit", lambda alpha, *rest: fit(1.0, *rest))
    monkeypatch.setattr(gaussians, "draw_map", lambda *_: gaussians.report.axes()[0])
    monkeypatch.setattr(gaussians, "draw_fits", lambda *_: gaussians.report.axes()[0])
    assert verdicts(tmp_path) == {1: False, 2: False}
