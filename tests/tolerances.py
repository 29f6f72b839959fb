"""Error bounds against the float64 reference, derived from the arithmetic and never tuned.

Rounding to nearest gives fl(a op b) = (a op b)(1 + d), |d| <= u, u = eps/2.  The error of a sum of n terms, in any
order, is then at most gamma_n * sum|terms|, gamma_n = n*u/(1 - n*u) (Higham, Accuracy and Stability of Numerical
Algorithms, section 4.2).
If the d are independent with mean zero, as for random data, n may be replaced by lambda*sqrt(n), except with
probability 2n*exp(-lambda^2/2) (Higham and Mary, SIAM J. Sci. Comput. 41, 2019, theorem 2.4).  With lambda = 9 that is
3e-18*n per element: below 1e-6 for all elements of the suite together.

The terms are those of the least favourable form that a backend may use:
    forward   sum|x-w| as sum x + sum w - 2*sum min(x,w):          |x|, |w| and 2|min(x,w)|
    grad_w    sum dY*(x-w) as sum dY*x - w*sum dY:                 |dY*x| and |dY*w|
    grad_x    sum dY*clamp(w-x, -1, 1), the only form on a CPU:    |dY*clamp|
              on a GPU 2*sum dY*sat((w+1)/2 - x/2) - sum dY:       |dY|*(2 + |w| + |x|)
16-bit floats are exact inputs, summed in float32; the sum is rounded once more to the output's dtype.
"""

import math

import torch
import torch.nn.functional as F
from cases import Case, Inputs, one_thread

LAMBDA = 9.0
# The forward takes the direct form where |sum x + sum w| or sum |w| exceeds this many times |Y|.
CANCELLATION = 32


def unit_roundoff(dtype: torch.dtype) -> float:
    """u of the sums of an operator on tensors of `dtype`."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2


def gamma(roundings: int, dtype: torch.dtype) -> float:
    u = unit_roundoff(dtype)
    n = min(roundings, LAMBDA * math.sqrt(roundings))
    return n * u / (1 - n * u)


def sums_of_terms(name: str, case: Case, inputs: Inputs, want: torch.Tensor, gpu: bool) -> torch.Tensor:
    """An upper bound of sum|terms| for every element of a pass: itself a convolution, in float64."""
    i = inputs.to(torch.float64)
    x, w, grad_y = i.x.abs(), i.w.abs(), i.grad_y.abs()
    top, bottom, left, right = case.padding
    pad = (left, right, top, bottom)
    geometry = case.stride, 0, case.dilation, case.groups
    padded = F.pad(x, pad)
    if name == "forward":  # 2|min(x,w)| = |x + w - |x - w|| <= |x| + |w| + |x - w|
        sums = F.conv2d(padded, torch.ones_like(w), None, *geometry) + w.sum((1, 2, 3))[:, None, None]
        return 2 * sums + want.abs() + 2 * i.bias.abs()[:, None, None]
    if name == "grad_w":
        sums = torch.nn.grad.conv2d_weight(padded, w.shape, grad_y, *geometry)
        return sums + w * grad_y.sum((0, 2, 3))[:, None, None, None]
    # |clamp(w - x)| <= 1 and <= |w| + |x|
    of_w, of_one = (torch.nn.grad.conv2d_input(padded.shape, v, grad_y, *geometry) for v in (w, torch.ones_like(w)))
    of_w, of_one = (F.pad(v, [-p for p in pad]) for v in (of_w, of_one))
    return 2 * of_one + of_w + x * of_one if gpu else torch.minimum(of_one, of_w + x * of_one)


@one_thread()
def tolerance(name: str, case: Case, inputs: Inputs, want: torch.Tensor, gpu: bool = False) -> torch.Tensor:
    """Upper bound of |sum - reference| for every element, before the sum is rounded to the dtype of the tensors.

    Counts n terms, two roundings inside each (x - w and the product), two to combine the partial sums, one for the
    bias, and the same for the reference in float64.  An underflowing product adds half the smallest subnormal number.
    """
    dtype = inputs.x.dtype
    n = case.terms[name] + 5
    sums = sums_of_terms(name, case, inputs, want, gpu)
    least = (
        torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).smallest_normal
        * 2
        * unit_roundoff(dtype)
    )
    return (gamma(n, dtype) + gamma(n, torch.float64)) * sums + (n * least if name != "forward" else 0)


def assert_within(got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor, what: str) -> None:
    """Asserts that `got` lies between want - bound and want + bound, both rounded to its dtype.

    Rounding is monotone, so this covers the output's half ulp, subnormal results and overflow to infinity.
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
