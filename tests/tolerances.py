"""How far a correct result may be from the float64 reference: derived from the arithmetic, tuned nowhere.

Rounding to nearest gives fl(a op b) = (a op b)(1 + d), |d| <= u, u = eps/2.  A sum of n terms, in any order, is then off
by at most gamma_n * sum|terms|, gamma_n = n*u/(1 - n*u) (Higham, Accuracy and Stability of Numerical Algorithms, 4.2).
When the d are independent with mean zero, as for random data, n may be replaced by lambda*sqrt(n) but for a
probability of 2n*exp(-lambda^2/2) (Higham and Mary, SIAM J. Sci. Comput. 41, 2019, theorem 2.4).  lambda = 9 makes that
3e-18*n an element: below 1e-6 for all the elements of the suite together.

The terms are those of the least favourable form that a backend may choose:
    forward   sum|x-w| as sum x + sum w - 2*sum min(x,w):          |x|, |w| and 2|min(x,w)|
    grad_w    sum dY*(x-w) as sum dY*x - w*sum dY:                 |dY*x| and |dY*w|
    grad_x    sum dY*clamp(w-x, -1, 1), no other form:             |dY*clamp|
The halves are summed in float32; the inputs are what they are, and the sum is rounded once more to the output's dtype.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from cases import Case, Inputs

LAMBDA = 9.0
# Where the forward's three sums cancel it must take the direct form.  The documented bound: they may exceed |Y| 32 times.
CANCELLATION = 32


def unit_roundoff(dtype: torch.dtype) -> float:
    """u of the sums of an operator whose tensors are `dtype`."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2


def gamma(roundings: int, dtype: torch.dtype) -> float:
    u = unit_roundoff(dtype)
    n = min(roundings, LAMBDA * math.sqrt(roundings))
    return n * u / (1 - n * u)


def sums_of_terms(name: str, case: Case, inputs: Inputs) -> torch.Tensor:
    """sum|terms| of every element of a pass, in float64."""
    i = inputs.to(torch.float64)
    top, bottom, left, right = case.padding
    pad = (left, right, top, bottom)
    _, _, oh, ow = case.y_shape
    x = F.pad(i.x, pad).unflatten(1, (case.groups, 1, -1))  # (N, groups, 1, C_in/groups, H, W)
    w = i.w.unflatten(0, (case.groups, -1))  # (groups, C_out/groups, C_in/groups, KH, KW)
    grad_y = i.grad_y.abs().unflatten(1, (case.groups, -1)).unsqueeze(3)  # (N, groups, C_out/groups, 1, OH, OW)
    shape = {"forward": grad_y.squeeze(3).shape, "grad_x": x.squeeze(2).shape, "grad_w": w.shape}[name]
    result = torch.zeros(shape, dtype=torch.float64)
    # some channels at a time, so that temporaries stay in the cache
    step = max(1, 2**16 // grad_y.numel())
    taps = itertools.product(range(case.KH), range(case.KW), range(0, w.size(2), step))
    for kh, kw, ci in taps:
        begin, channels = (kh * case.dilation[0], kw * case.dilation[1]), slice(ci, ci + step)
        at = tuple(slice(b, b + (n - 1) * s + 1, s) for b, n, s in zip(begin, (oh, ow), case.stride, strict=True))
        x_k, w_k = x[:, :, :, channels, at[0], at[1]], w[:, :, channels, kh, kw, None, None]
        if name == "forward":
            result += (x_k.abs() + w_k.abs() + 2 * torch.minimum(x_k, w_k).abs()).sum(3)
        elif name == "grad_w":
            result[:, :, channels, kh, kw] = (grad_y * (x_k.abs() + w_k.abs())).sum((0, 4, 5))
        else:
            result[:, :, channels, at[0], at[1]] += (grad_y * (w_k - x_k).clamp(-1, 1).abs()).sum(2)
    result = result.flatten(0, 1) if name == "grad_w" else result.flatten(1, 2)
    return F.pad(result, [-p for p in pad]) if name == "grad_x" else result


def tolerance(name: str, case: Case, inputs: Inputs) -> torch.Tensor:
    """Bound of |sum - reference| for every element, before the sum is rounded to the dtype of the tensors.

    n terms, two more roundings inside each (x - w and the product), two for putting the partial sums together, one for
    the bias; the reference, itself rounded, gets the same in float64.  A product may underflow, by half the least number.
    """
    dtype = inputs.x.dtype
    n = case.terms[name] + 5
    sums = sums_of_terms(name, case, inputs)
    if name == "forward":
        sums = sums + inputs.bias.double().abs()[:, None, None]
    least = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).smallest_normal * 2 * unit_roundoff(dtype)
    return (gamma(n, dtype) + gamma(n, torch.float64)) * sums + (n * least if name != "forward" else 0)


def assert_within(got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor, what: str) -> None:
    """`got` lies between want - bound and want + bound, both rounded to its dtype: rounding is monotone.

    That counts the output's half ulp, subnormal results and overflow to infinity without a formula for each.
    """
    got = got.cpu()
    # through float32, as the operators do: float64 -> float32 -> half may differ from float64 -> half by one ulp
    sums = torch.float64 if got.dtype == torch.float64 else torch.float32
    low, high = (limit.to(sums).to(got.dtype) for limit in (want - bound, want + bound))
    wrong = ~((low <= got) & (got <= high))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        ratio = ((got.double() - want).abs() / bound)[wrong].max().item()
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {got.numel()} too far, the worst {ratio:.3g} bounds off; first at {at}: "
            f"got {got[at].item()!r}, expected {want[at].item()!r} within {bound[at].item():.3g}"
        )
