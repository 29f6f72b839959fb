"""How far a correct result may be from the float64 reference: derived from the arithmetic, tuned nowhere.

Rounding to nearest gives fl(a op b) = (a op b)(1 + d), |d| <= u, u = eps/2.  A sum of n terms, in any order, is then
off by at most gamma_n * sum|terms|, gamma_n = n*u/(1 - n*u) (Higham, Accuracy and Stability of Numerical Algorithms,
section 4.2).
When the d are independent with mean zero, as for random data, n may be replaced by lambda*sqrt(n) but for a
probability of 2n*exp(-lambda^2/2) (Higham and Mary, SIAM J. Sci. Comput. 41, 2019, theorem 2.4).  lambda = 9 makes that
3e-18*n an element: below 1e-6 for all the elements of the suite together.

The terms are those of the least favourable form that a backend may choose:
    forward   sum|x-w| as sum x + sum w - 2*sum min(x,w):          |x|, |w| and 2|min(x,w)|
    grad_w    sum dY*(x-w) as sum dY*x - w*sum dY:                 |dY*x| and |dY*w|
    grad_x    sum dY*clamp(w-x, -1, 1), on a CPU no other form:    |dY*clamp|
              on a GPU 2*sum dY*sat((w+1)/2 - x/2) - sum dY:       |dY|*(2 + |w| + |x|)
The halves are summed in float32; the inputs are what they are, and the sum is rounded once more to the output's dtype.
"""

import math

import torch
import torch.nn.functional as F
from cases import Case, Inputs, one_thread

LAMBDA = 9.0
# Where the forward's three sums cancel it takes the direct form: |sum x + sum w| and sum |w| may be so many times |Y|.
CANCELLATION = 32


def unit_roundoff(dtype: torch.dtype) -> float:
    """u of the sums of an operator whose tensors are `dtype`."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2


def gamma(roundings: int, dtype: torch.dtype) -> float:
    u = unit_roundoff(dtype)
    n = min(roundings, LAMBDA * math.sqrt(roundings))
    return n * u / (1 - n * u)


def sums_of_terms(name: str, case: Case, inputs: Inputs, want: torch.Tensor, gpu: bool) -> torch.Tensor:
    """A bound of sum|terms| for every element of a pass, itself a convolution, in float64."""
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
    """Bound of |sum - reference| for every element, before the sum is rounded to the dtype of the tensors.

    n terms, two more roundings inside each (x - w and the product), two for putting the partial sums together, one for
    the bias; the reference, itself rounded, gets the same in float64.  A product may underflow, by half the least
    number.
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
