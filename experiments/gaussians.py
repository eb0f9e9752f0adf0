"""One Gaussian fitted to a mixture of Gaussians: when does it cover the modes, when does it seek one? (claims 1 and 2)

    https://arxiv.org/abs/2411.07595    Fig. 1, 5, 6: two components    Fig. 7, 8: three and four    text: appendix A.1

    python experiments/gaussians.py        (one CPU core, about 15 seconds)

pi_ref is a mixture of equally weighted Gaussians, each narrower than its left neighbour; pi = N(mu, sd) minimises

    D_alpha(pi, pi_ref) = -alpha H(pi) + H(pi, pi_ref) = alpha E_pi[log pi] - E_pi[log pi_ref]

which is the reverse KL divergence where alpha = 1 and the part of H-DPO's objective that pulls to the reference for
every alpha. H(pi) has a closed form, the cross-entropy is an integral over a line, and there are only two parameters:
nothing is sampled, and every local minimum of a grid over (mu, sd) is refined, so that the best of them is the global
one. The grid alone would not do: with alpha = 1, components far apart tie near D_alpha = ln(components), and what is
left of their overlap, a few 1e-5 of D_alpha at distance 7, decides between them.

Why alpha decides: dD_alpha/dalpha = -H(pi). A smaller alpha takes more from a wide pi's score than from a narrow one's.
Where alpha = 0 no entropy is left in D_alpha. It is lowest for a pi that is a point, sd = 0, at pi_ref's highest point.
"""

import math
from dataclasses import dataclass
from functools import partial

import report
import torch
import tyro
from torch import Tensor

Verdict = partial(report.Verdict, where="exact")

COMPONENTS = (1.0, 0.8, 0.5, 0.3)  # standard deviations from left to right; a mixture has the first two, three or four
DISTANCES = {2: (4, 5, 6), 3: (3, 5, 7), 4: (3, 5, 7)}  # between neighbouring means, by the number of components
ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)

# Thresholds
NEAR = 0.25  # pi seeks a component if mu is this near to its mean, in units of the component's sd, and
NARROW = 1.1  # sd is no larger than this in the same units.
WIDE = 1.5  # pi covers several if mu is between the outermost means and sd is larger than this, in the widest one's.

# What appendix A.1 says of each panel of Fig. 5. Of alpha 0.8 at distance 4, and of alpha 1 at distance 5, it says only
# that a smaller alpha is the one that seeks.
LEFT, RIGHT, COVERS = 0, 1, "covers"
FIG_5 = {
    4: {1.0: COVERS, 0.8: COVERS, 0.6: RIGHT, 0.4: RIGHT, 0.2: RIGHT, 0.0: RIGHT},
    5: {1.0: COVERS, 0.8: RIGHT, 0.6: RIGHT, 0.4: RIGHT, 0.2: RIGHT, 0.0: RIGHT},
    6: {1.0: LEFT, 0.8: RIGHT, 0.6: RIGHT, 0.4: RIGHT, 0.2: RIGHT, 0.0: RIGHT},
}
FIG_6_CAP = 3.0  # colours of the map end here, as the paper's do

# A trapezoidal rule in z = (x - mu) / sd. log pi_ref bends within a few hundredths where one component takes over from
# the next; steps of sd / 200 are finer than that for every sd that can be a minimum.
Z = torch.linspace(-9, 9, 3601, dtype=torch.float64)
Z_WEIGHTS = (-(Z**2) / 2).softmax(0)


@dataclass
class Args:
    results: str = str(report.RESULTS)
    """Where the table and the figures go"""
    fast: bool = False
    """A coarser grid to start from, for tests"""


def mixture(components: int, distance: float) -> tuple[Tensor, Tensor]:
    """Means and standard deviations, (components,) both."""
    means = distance * torch.arange(components, dtype=torch.float64)
    return means, torch.tensor(COMPONENTS[:components], dtype=torch.float64)


def log_density(x: Tensor, means: Tensor, sds: Tensor) -> Tensor:
    """log pi_ref(x), same shape as x."""
    components = torch.stack([-(((x - m) / s) ** 2) / 2 - s.log() for m, s in zip(means, sds)])  # (components, ...)
    return components.logsumexp(0) - math.log(len(means) * math.sqrt(2 * math.pi))


def cross_entropy(mu: Tensor, sd: Tensor, means: Tensor, sds: Tensor) -> Tensor:
    """H(pi, pi_ref) = -E_pi[log pi_ref], same shape as mu and sd."""
    return -log_density(mu[..., None] + sd[..., None] * Z, means, sds) @ Z_WEIGHTS


def entropy(sd: Tensor) -> Tensor:
    return sd.log() + 0.5 * math.log(2 * math.pi * math.e)


def d_alpha(mu: Tensor, sd: Tensor, alpha: float, means: Tensor, sds: Tensor) -> Tensor:
    return cross_entropy(mu, sd, means, sds) - alpha * entropy(sd)


def search_grid(means: Tensor, sds: Tensor, fast: bool) -> tuple[Tensor, Tensor, Tensor]:
    """mu (columns,), sd (rows,) and H(pi, pi_ref) (rows, columns), which serves every alpha.

    sd from less than the narrowest component needs at the smallest alpha to more than the mixture is wide.
    """
    mu = torch.linspace(means[0] - 3, means[-1] + 3, 41 if fast else 121, dtype=torch.float64)
    sd = torch.logspace(math.log10(0.05), math.log10(12), 17 if fast else 49, dtype=torch.float64)
    return mu, sd, torch.stack([cross_entropy(mu, row.expand_as(mu), means, sds) for row in sd])


def local_minima(values: Tensor) -> Tensor:
    """(found, 2): row and column of every point of a map that is no higher than its eight neighbours."""
    lowest = -torch.nn.functional.max_pool2d(-values[None], kernel_size=3, stride=1, padding=1)[0]
    return (values == lowest).nonzero()


def refine(mu: float, sd: float, alpha: float, means: Tensor, sds: Tensor) -> tuple[float, float, float]:
    """mu, sd and D_alpha of the local minimum next to a point."""
    start = torch.tensor([mu, math.log(sd)], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [start], max_iter=100, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def value():
        optimizer.zero_grad()
        d = d_alpha(start[0], start[1].exp(), alpha, means, sds)
        d.backward()
        return d

    optimizer.step(value)
    mu, log_sd = start.detach()
    return mu.item(), log_sd.exp().item(), d_alpha(mu, log_sd.exp(), alpha, means, sds).item()


def fit(alpha: float, means: Tensor, sds: Tensor, grid: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float, float]:
    """mu, sd and D_alpha of the global minimum."""
    if alpha == 0:
        x = torch.linspace(means[0], means[-1], 100_001, dtype=torch.float64)
        log_p = log_density(x, means, sds)
        return x[log_p.argmax()].item(), 0.0, -log_p.max().item()
    mu, sd, cross = grid
    starts = local_minima(cross - alpha * entropy(sd)[:, None])
    return min((refine(mu[j].item(), sd[i].item(), alpha, means, sds) for i, j in starts), key=lambda found: found[2])


def place(mu: float, sd: float, means: Tensor, sds: Tensor) -> int | str:
    """The component that pi seeks, counted from the left, or "covers", or "neither"."""
    for i, (m, s) in enumerate(zip(means.tolist(), sds.tolist())):
        if abs(mu - m) <= NEAR * s and sd <= NARROW * s:
            return i
    return COVERS if means[0] < mu < means[-1] and sd > WIDE * sds.max() else "neither"


def ends_on_highest(alphas: dict[float, tuple[float, float, float]], means: Tensor, sds: Tensor) -> bool:
    """Fig. 7 and 8 in one panel row: not on the narrowest at alpha 1, there from some alpha down, ever narrower."""
    falling = sorted(alphas, reverse=True)
    on_narrowest = [place(*alphas[alpha][:2], means, sds) == len(means) - 1 for alpha in falling]
    widths = [alphas[alpha][1] for alpha in falling]
    at_one = place(*alphas[1.0][:2], means, sds)
    return (
        (at_one == COVERS or at_one in range(len(means) - 1))
        and on_narrowest == sorted(on_narrowest)
        and on_narrowest[falling.index(0.2)]
        and all(wider > narrower for wider, narrower in zip(widths, widths[1:]))
    )


def density(x: Tensor, mu: float, sd: float) -> Tensor:
    return (-(((x - mu) / sd) ** 2) / 2).exp() / (sd * math.sqrt(2 * math.pi))


def draw_fits(fits):
    """Fig. 5, 7 and 8: a row for every number of components, a column for every distance."""
    figure, panels = report.axes(rows=3, columns=3, width=11, height=3)
    colours = report.shades(ALPHAS)
    for row, components in zip(panels, DISTANCES):
        for panel, distance in zip(row, DISTANCES[components]):
            means, sds = mixture(components, distance)
            x = torch.linspace(-3, means[-1].item() + 3, 2001, dtype=torch.float64)
            panel.fill_between(x, log_density(x, means, sds).exp(), color="#cccccc", label=r"$\pi_{ref}$")
            for alpha in reversed(ALPHAS):
                mu, sd, _ = fits[components, distance][alpha]
                label = rf"$\hat\pi$, $\alpha$ = {alpha:g}"
                if sd == 0:
                    panel.axvline(mu, color=colours[alpha], linestyle=":", label=label)
                else:
                    panel.plot(x, density(x, mu, sd), color=colours[alpha], label=label)
            # The paper's panels are cut at such a height, too: whole, the narrowest fit would flatten the mixture.
            panel.set(ylim=(0, 0.9), xticks=means, title=f"{components} components, distance {distance}")
        row[0].set_ylabel("density")
    for panel in panels[-1]:
        panel.set_xlabel("x")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def draw_map(fits, grids):
    """Fig. 6: D_alpha over (mu, sd) for two components, as the logarithm of its ratio to the minimum."""
    distances = DISTANCES[2]
    figure, panels = report.axes(rows=len(distances), columns=len(ALPHAS), width=11, height=2.2)
    for row, distance in zip(panels, distances):
        mu, sd, cross = grids[2, distance]
        for panel, alpha in zip(row, reversed(ALPHAS)):
            best_mu, best_sd, best = fits[2, distance][alpha]
            log_ratio = ((cross - alpha * entropy(sd)[:, None]) / best).log().clamp(max=FIG_6_CAP)
            colours = panel.pcolormesh(mu, sd, log_ratio, vmin=0, vmax=FIG_6_CAP, cmap="magma_r", shading="gouraud")
            panel.plot(best_mu, best_sd, "*", color="red", markersize=10, markeredgecolor="white", clip_on=False)
            panel.set(ylim=(0, 3.5), xticks=[0, distance], title=rf"$\alpha$ = {alpha:g}, distance {distance}")
            panel.grid(False)
        row[0].set_ylabel(r"sd of $\pi$")
    for panel in panels[-1]:
        panel.set_xlabel(r"mean of $\pi$")
    figure.colorbar(
        colours, ax=panels, label=r"min(3, ln $D_\alpha(\pi\,||\,\pi_{ref})$ - ln $D_\alpha(\hat\pi\,||\,\pi_{ref})$)"
    )
    return figure


def main(args: Args) -> None:
    cases = [(components, distance) for components, distances in DISTANCES.items() for distance in distances]
    grids, fits, places = {}, {}, {}
    for case in cases:
        target = mixture(*case)
        grids[case] = search_grid(*target, args.fast)
        fits[case] = {alpha: fit(alpha, *target, grids[case]) for alpha in ALPHAS}
        places[case] = {alpha: place(*fits[case][alpha][:2], *target) for alpha in ALPHAS}

    def numbers(cases, *alphas: float) -> str:
        """mu / sd of some cases at some alphas, in a line."""
        shown = (
            f"{components} components at {distance}: "
            + ", ".join("{:.2f} / {:.2f}".format(*fits[components, distance][alpha]) for alpha in alphas)
            for components, distance in cases
        )
        return f"mu / sd at alpha {', '.join(f'{alpha:g}' for alpha in alphas)}: {'; '.join(shown)}"

    as_fig_5 = [places[2, distance][alpha] == FIG_5[distance][alpha] for distance in FIG_5 for alpha in ALPHAS]
    two, several = [case for case in cases if case[0] == 2], [case for case in cases if case[0] > 2]
    as_fig_7_and_8 = [ends_on_highest(fits[case], *mixture(*case)) for case in several]
    seeks = f"seeks = mu within {NEAR} and sd at most {NARROW} of the component's sd"
    covers = f"covers = mu between the outermost means, sd above {WIDE} of the widest component's"
    verdicts = [
        Verdict(
            1, "H-DPO Fig. 1, 5, 6",
            "two Gaussians, sd 1 and 0.8: at distance 4 reverse KL (alpha 1) covers both and alpha 0.6 seeks one; at "
            "distance 5 alpha 0.8 already does; at 6 alpha 1 does, on the wider left one, and smaller alpha moves to "
            "the narrower right one",
            f"in all 18 panels of Fig. 5: alpha 1 and 0.8 at distance 4 and alpha 1 at 5 cover, alpha 1 at 6 seeks the "
            f"left one, all others the right one; {seeks}; {covers}",
            all(as_fig_5),
            f"{sum(as_fig_5)} of {len(as_fig_5)} panels; {numbers(two, 1.0, 0.8, 0.6)}",
        ),
        Verdict(
            2, "H-DPO Fig. 7, 8",
            "three and four Gaussians: reverse KL covers several or seeks one that is not the narrowest; smaller alpha "
            "ends on the mode of highest density in all cases, and narrows further",
            "in all 6 rows of Fig. 7 and 8: alpha 1 covers, or seeks a component other than the narrowest; alpha 0.2 "
            "seeks the narrowest, as does every alpha below one that does; sd falls from each alpha to the next; "
            f"{seeks}; {covers}",
            all(as_fig_7_and_8),
            f"{sum(as_fig_7_and_8)} of {len(several)} rows; {numbers(several, 1.0, 0.6, 0.2)}",
        ),
    ]  # fmt: skip

    header = ("components", "distance", *(f"alpha {alpha:g}" for alpha in reversed(ALPHAS)))
    rows = [
        (*case, *(f"{fits[case][alpha][0]:.3f} / {fits[case][alpha][1]:.3f}" for alpha in reversed(ALPHAS)))
        for case in cases
    ]
    text = (
        "mu / sd of the Gaussian that minimises D_alpha. Components have sd 1, 0.8, 0.5 and 0.3 from left to right, "
        "the first mean is 0.\n\n"
        + report.table(header, rows)
        + "\nalpha = 0 leaves no entropy term, so that D_alpha is lowest for a point on the mixture's highest value: "
        "sd 0, the dotted line in the figure. Densities are cut at 0.9.\n\n"
        "Fig. 6's map of two components, with the minimum as a star; each panel's colours are relative to its own "
        "minimum:\n\n![D_alpha over mean and sd](gaussians_map.png)"
    )
    draw_map(fits, grids).savefig(report.folder(args) / "gaussians_map.png", dpi=110)
    report.save(args, "gaussians", verdicts, text, draw_fits(fits))


if __name__ == "__main__":
    main(tyro.cli(Args))
