"""Reach: how much of a wanted change of a weight the best member of a family of updates can be.

A family is all the updates that fixed options of `smoa.SMoALinear` allow. It holds each multiple of
its members, so the best fit to a target T leaves a right angle, and

    reach = 1 - min ||T - delta_W||^2 / ||T||^2 = max cos^2(T, delta_W)    between 0 and 1

    from reach import reach, ceiling
    reach(T, W0, rank=4, modulate=False)      # LoRA of rank 4: exact, by an SVD
    reach(T, W0, rank=16, num_blocks=4)       # SMoA of as many parameters: a lower bound
    ceiling(T, W0, num_blocks=4)              # what lies inside the blocks at all

Without the anchor the best fit is the truncated SVD, block by block (Eckart and Young): LoRA's and
MELoRA's reach is exact. With it the fit is weighted, min ||T_k - (B A) * M_k||^2, and has no
closed form: given A each row of B is a least-squares problem of its own, and given B each column of
A, so the two take turns, from several starts. Each turn lowers the error; the end may be a local
best. So the reach of HiRA and SMoA is a LOWER BOUND. That all starts end alike speaks for it, and
proves nothing.

All of it is computed in float64, on the target's device.
"""

import runner  # noqa: F401 (puts smoa.py on the path)
import torch

import smoa


def blocks(weight, num_blocks, order):
    """[(rows_k, cols_k)] of a weight's aligned blocks; order as `smoa.SMoALinear` takes it."""
    m, n = weight.shape
    if isinstance(order, str) and (order == "natural" or num_blocks == 1):
        order = torch.arange(m), torch.arange(n)
    elif isinstance(order, str):
        order = smoa.spectral_order(weight)
    rows, cols = (axis.to(weight.device).tensor_split(num_blocks) for axis in order)
    return list(zip(rows, cols))


def best_low_rank(T, rank):
    """The closest matrix of at most that rank, (m, n): the truncated SVD."""
    U, s, Vh = torch.linalg.svd(T, full_matrices=False)
    return U[:, :rank] * s[:rank] @ Vh[:rank]


def best_rows(T, M, A):
    """B (m, r), the best for given A (r, n): row i minimises sum_j (T_ij - M_ij (B A)_ij)^2."""
    r, n = A.shape
    pairs = (A[:, None] * A).reshape(r * r, n)  # A_a A_b, (r^2, n)
    gram = (M.square() @ pairs.mT).reshape(-1, r, r)  # sum_j M_ij^2 A_aj A_bj, (m, r, r)
    right = (M * T) @ A.mT  # (m, n) @ (n, r) -> (m, r)
    # A trace of ridge for rows that M makes zero: nothing fits them, so 0 is as good as any.
    size = gram.diagonal(dim1=1, dim2=2).sum(1)  # (m,)
    size = size.where(size > 0, 1.0)
    ridge = 1e-13 * size[:, None, None] * torch.eye(r, dtype=T.dtype, device=T.device)
    return torch.linalg.solve(gram + ridge, right)


def best_modulated(T, M, A, sweeps, tolerance):
    """The fit (B A) * M of T that alternating least squares finds from A (r, n)."""
    held = torch.zeros((), dtype=T.dtype, device=T.device)
    for _ in range(sweeps):
        A = torch.linalg.qr(A.mT)[0].mT  # the same row space and best fit, well conditioned
        B = best_rows(T, M, A)
        B = torch.linalg.qr(B)[0]
        A = best_rows(T.mT, M.mT, B.mT).mT
        before, held = held, (T * ((B @ A) * M)).sum()  # of a best fit <T, D> = ||D||^2
        if held - before <= tolerance * T.square().sum():
            break
    return (B @ A) * M


def starts(T, M, rank, count, generator):
    """Row spaces to start from, each (rank, n): the leading one of T * M, then random ones."""
    yield torch.linalg.svd(T * M, full_matrices=False)[2][:rank]
    for _ in range(count - 1):
        yield torch.randn(rank, T.shape[1], generator=generator, dtype=T.dtype).to(T.device)


@torch.no_grad()
def fits_by_start(
    target,
    weight,
    *,
    rank,
    num_blocks=1,
    modulate=True,
    order="spectral",
    count=3,
    sweeps=200,
    tolerance=1e-6,
    seed=0,
):
    """The member (m, n) at which each start ends, `count` of them; one where it is exact."""
    T, W0 = target.detach().double(), weight.detach().double()
    generator = torch.Generator().manual_seed(seed)
    fits = [torch.zeros_like(T) for _ in range(count if modulate else 1)]
    for k, (rows, cols) in enumerate(blocks(W0, num_blocks, order)):
        r_k = rank // num_blocks + (k < rank % num_blocks)
        r_k = min(r_k, len(rows), len(cols))
        T_k, M_k = T[rows[:, None], cols], W0[rows[:, None], cols]  # (m_k, n_k)
        if r_k == 0:
            continue
        if not modulate:
            fits[0][rows[:, None], cols] = best_low_rank(T_k, r_k)
            continue
        for D, A in zip(fits, starts(T_k, M_k, r_k, count, generator)):
            D[rows[:, None], cols] = best_modulated(T_k, M_k, A, sweeps, tolerance)
    return fits


def share_held(target, fit):
    """Share of the target's energy in a best fit, whose error is at a right angle to it."""
    return (fit.square().sum() / target.detach().double().square().sum()).item()


def reach_by_start(target, weight, **options):
    """Where each start ends, a share of the energy each; see `reach`."""
    return [share_held(target, fit) for fit in fits_by_start(target, weight, **options)]


def best_fit(target, weight, **options):
    """The member (m, n) of the family that holds most of the target; options as of `reach`."""
    fits = fits_by_start(target, weight, **options)
    return max(fits, key=lambda fit: share_held(target, fit))


def reach(target, weight, **options):
    """Share of a target's energy that the best member of a family holds, a float in [0, 1].

    Exact without the anchor; with it the best of several starts, a lower bound.

    Args:
        target: (m, n), the wanted change of the weight. Not zero.
        weight: W0, (m, n), the frozen weight; also what a control puts in its place.
        rank, num_blocks, modulate, order: as `smoa.SMoALinear`; one block where none are given.
        count: starts of the alternating fit. Each takes `sweeps` turns at most, and stops when one
            gains less than `tolerance` of the energy in its block.
        seed: of the random starts.

    >>> u, v, W0 = torch.ones(4), torch.arange(6.0), torch.eye(4, 6) + 1
    >>> round(reach(torch.outer(u, v), W0, rank=1, modulate=False), 6)      # rank 1 is LoRA's
    1.0
    >>> round(reach(u[:, None] * W0 * v, W0, rank=1), 6)                   # a rescaling is HiRA's
    1.0
    """
    return max(reach_by_start(target, weight, **options))


def ceiling(target, weight, *, num_blocks, order="spectral"):
    """Share of the target's energy inside the blocks: no update in these blocks holds more."""
    T = target.detach().double()
    pieces = blocks(weight.detach().double(), num_blocks, order)
    inside = sum(T[rows[:, None], cols].square().sum() for rows, cols in pieces)
    return (inside / T.square().sum()).item()


def noise_like(weight, seed=0):
    """Gaussian noise of the weight's shape and norm: an anchor that knows nothing."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight)
    return noise * (weight.norm() / noise.norm())


def shuffled(weight, seed=0):
    """The weight's own entries at other places: an anchor of the same values, and no structure."""
    places = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))
    return weight.flatten()[places.to(weight.device)].view(weight.shape)


# Options at equal parameters, rho (m + n): LoRA's rank is rho, with K blocks the rank is K rho.
FAMILIES = {
    "LoRA": dict(num_blocks=1, modulate=False),
    "HiRA": dict(num_blocks=1, modulate=True),
    "MELoRA": dict(num_blocks=4, modulate=False, order="natural"),
    "SMoA": dict(num_blocks=4, modulate=True, order="spectral"),
    "SMoA natural": dict(num_blocks=4, modulate=True, order="natural"),
}


def family(name, rho, num_blocks=4):
    """Options of `reach` for a family of FAMILIES, of as many parameters as a LoRA of rank rho."""
    options = dict(FAMILIES[name])
    if options["num_blocks"] > 1:
        options["num_blocks"] = num_blocks
    return options | dict(rank=rho * options["num_blocks"])
