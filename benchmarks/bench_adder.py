"""Times the adder convolution on real layers against F.conv2d, the eager reference formula and unfold + cdist.

    python benchmarks/bench_adder.py                  a selection of layers, within three minutes on two cores
    python benchmarks/bench_adder.py --full           every layer, every pass against every peer
    python benchmarks/bench_adder.py --csv r.csv --plot r.png
    python benchmarks/bench_adder.py --read r.csv --plot r.png        means and plot of an earlier run
    python benchmarks/bench_adder.py --device cuda --dtype bfloat16

A term is one |x - w|, the counterpart of a convolution's multiply-accumulate; a whole step (forward, grad_x, grad_w)
has three.  The contestants of a row are timed in alternating rounds and compared by their medians (harness/timing.py).
Results are first checked against float64 (harness/verify.py).  Peers that need too much memory or time get fewer
images; terms per second are compared.

On a GPU, times are device times between events around a call, and the L2 cache is flushed before each call.  F.conv2d
is cuDNN's with its algorithm search on, in float32 without TF32, and the contestant "conv2d_tf32" with it.  The limit
is a model (harness/cuda_device.py).

The CSV file starts with the machine and its limits as comments: Gterm/s of the loops of register_limits.cpp on one
thread, or of the model; and the means.  A timed row has layer, pass, contestant, memory_format, batch, terms, seconds,
spread, samples and gterm_per_s; share_of_limit if the contestant is "adder".  A row of the pass "memory" has
extra_bytes and allowed_bytes.  The geometric means over the layers are named by what is divided by what:

    <pass>_over_conv2d                  both contiguous; with _channels_last: both channels_last
    <pass>_over_conv2d_best_format      each in its faster memory format, layer by layer
    <pass>_over_conv2d_tf32             likewise, and with _best_format
    forward_over_cdist, step_over_eager, forward_over_eager, step_over_cdist       contiguous
    <pass>_share_of_limit               terms per second over those of the register-only loop, or of the model
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import cuda_device, peers, register_limits, report, verify
from harness.layers import DEFAULT_LAYERS, LAYERS, Layer, named
from harness.memory import extra_memory
from harness.register_limits import Together
from harness.timing import Contestant, take_turns, wall_clock

import adderops.info
from adderops.functional import adder_conv2d

PASSES = ("forward", "grad_x", "grad_w", "step")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Maximum terms per pass of a peer: keeps the eager temporaries below 1 GiB and a sample below minutes.
EAGER_TERMS, CDIST_TERMS = 2**26, 2**27


@dataclass(frozen=True)
class Setting:
    """Device and dtype of all contestants."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def tensors(self, layer: Layer, memory_format: torch.memory_format = torch.contiguous_format) -> list[torch.Tensor]:
        return [t.to(self.device, self.dtype) for t in layer.tensors(memory_format)]

    def clock(self, call: Callable[[], object]) -> Callable[[int], float]:
        return cuda_device.device_clock(call) if self.device == "cuda" else wall_clock(call)

    @property
    def sampling(self) -> dict[str, float]:
        """What `take_turns` shall know."""
        return {"sample": cuda_device.SAMPLE} if self.device == "cuda" else {}

    @property
    def has_tf32(self) -> bool:
        return self.device == "cuda" and self.dtype == torch.float32


def _with_tf32(call: Callable[[], object]) -> Callable[[], object]:
    """The same call on the tensor cores, which `main` keeps from float32."""

    def run():
        torch.backends.cudnn.allow_tf32 = True
        try:
            return call()
        finally:
            torch.backends.cudnn.allow_tf32 = False

    return run


def _passes(convolution: Callable, layer: Layer, tensors: Sequence[torch.Tensor]) -> dict[str, Callable]:
    """The four passes of a differentiable convolution as calls without arguments that return the results."""
    x, w, grad_y = tensors

    def apply(x, w):
        return convolution(x, w, stride=layer.stride, padding=layer.padding)

    def forward():
        with torch.no_grad():
            return (apply(x, w),)

    def gradient(*needed: bool):
        leaves = [t.detach().requires_grad_(need) for t, need in zip((x, w), needed, strict=True)]
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        y = apply(*leaves)
        return lambda: torch.autograd.grad(y, wanted, grad_y, retain_graph=True)

    leaf_x, leaf_w = x.detach().requires_grad_(), w.detach().requires_grad_()

    def step():
        y = apply(leaf_x, leaf_w)
        return y.detach(), *torch.autograd.grad(y, (leaf_x, leaf_w), grad_y)

    return {"forward": forward, "grad_x": gradient(True, False), "grad_w": gradient(False, True), "step": step}


def _contestants(
    layer: Layer, passes: Sequence[str], full: bool, setting: Setting
) -> dict[str, dict[tuple[str, str, int], Callable]]:
    """{pass: {(contestant, memory format, batch): call}}; checks the results of adder and peers."""
    calls: dict[str, dict[tuple[str, str, int], Callable]] = {name: {} for name in passes}
    for format_name, memory_format in FORMATS.items():
        tensors = setting.tensors(layer, memory_format)
        adder = _passes(adder_conv2d, layer, tensors)
        y, grad_x, grad_w = adder["step"]()
        verify.check_forward(f"adder {format_name}", layer, *tensors[:2], y)
        verify.check_gradients(f"adder {format_name}", layer, *tensors, grad_x, grad_w)
        for name, alone in (("forward", y), ("grad_x", grad_x), ("grad_w", grad_w)):
            if not torch.equal(adder[name]()[0], alone):
                raise SystemExit(f"{layer.name} adder {format_name} {name}: differs from the same pass within a step")
        conv2d = _passes(F.conv2d, layer, tensors)
        for name in passes:
            calls[name]["adder", format_name, layer.batch] = adder[name]
            calls[name]["conv2d", format_name, layer.batch] = conv2d[name]
            if setting.has_tf32:
                calls[name]["conv2d_tf32", format_name, layer.batch] = _with_tf32(conv2d[name])

    if peers.has_cdist(setting.dtype):
        small = layer.batch_within(CDIST_TERMS)
        tensors = setting.tensors(small)
        x, w, _ = tensors
        if "forward" in passes:
            verify.check_forward("cdist", small, x, w, peers.cdist_forward(small, x, w))
            calls["forward"]["cdist", "contiguous", small.batch] = lambda s=small, x=x, w=w: peers.cdist_forward(
                s, x, w
            )
        if "step" in passes and full:
            calls["step"]["cdist", "contiguous", small.batch] = lambda s=small, t=tensors: peers.cdist_step(s, *t)

    small = layer.batch_within(EAGER_TERMS)
    tensors = setting.tensors(small)
    x, w, _ = tensors
    if "step" in passes:
        y, grad_x, grad_w = peers.eager_step(small, *tensors)
        verify.check_forward("eager", small, x, w, y, steps_in=setting.dtype)
        verify.check_gradients("eager", small, *tensors, grad_x, grad_w, steps_in=setting.dtype)
        calls["step"]["eager", "contiguous", small.batch] = lambda s=small, t=tensors: peers.eager_step(s, *t)
    if "forward" in passes and full:
        calls["forward"]["eager", "contiguous", small.batch] = lambda s=small, x=x, w=w: peers.eager_forward(s, x, w)
    return calls


def _time_row(
    layer: Layer, name: str, calls: dict, limit: Together | float | None, budget: float, setting: Setting
) -> list[dict]:
    """Times one pass of one layer and returns one row per contestant.

    Args:
        limit: loops to time among the contestants, or the terms per second of a model.
    """
    passes = 3 if name == "step" else 1
    players = {
        (what, form, batch): Contestant(
            f"{what} {form}", passes * layer.terms * batch / layer.batch, setting.clock(call)
        )
        for (what, form, batch), call in calls.items()
    }
    if isinstance(limit, Together):
        players["limit", "registers", 0] = Contestant("limit registers", limit.terms, limit.seconds)
    timings = take_turns(list(players.values()), budget, **setting.sampling)
    rows = []
    for (what, form, batch), player in players.items():
        timing = timings[player.name]
        rows.append(
            {
                "layer": layer.name,
                "pass": name,
                "contestant": what,
                "memory_format": form,
                "batch": batch,
                "terms": player.terms,
                "seconds": timing.seconds,
                "spread": timing.spread,
                "samples": timing.samples,
                "gterm_per_s": player.terms / timing.seconds / 1e9,
            }
        )
    if limit:
        highest = rows[-1]["gterm_per_s"] if isinstance(limit, Together) else limit / 1e9
        for row in rows:
            if row["contestant"] == "adder":
                row["share_of_limit"] = row["gterm_per_s"] / highest
    return rows


class Results:
    """Rates of the timed rows by (layer, pass, contestant, memory format), and their ratios."""

    def __init__(self, rows: Sequence[dict]) -> None:
        self.rows = rows = [row for row in rows if row["pass"] in PASSES]
        self._rates = {(r["layer"], r["pass"], r["contestant"], r["memory_format"]): r["gterm_per_s"] for r in rows}
        self.layers = list(dict.fromkeys(r["layer"] for r in rows))
        self._shares = {
            (r["layer"], r["pass"]): r["share_of_limit"]
            for r in rows
            if r["memory_format"] == "contiguous" and "share_of_limit" in r
        }

    def rate(self, layer: str, name: str, contestant: str, form: str = "contiguous") -> float | None:
        """Gterm/s, in the faster memory format if `form` is "best"; None if the contestant did not take part."""
        if form == "best":
            rates = [self._rates.get((layer, name, contestant, f)) for f in FORMATS]
            return max((rate for rate in rates if rate), default=None)
        return self._rates.get((layer, name, contestant, form))

    def share(self, layer: str, name: str) -> float | None:
        """The adder convolution's share of the limit, contiguous."""
        return self._shares.get((layer, name))

    def ratio(self, layer: str, name: str, other: str, form: str = "contiguous") -> float | None:
        """Terms per second of the adder convolution over those of `other`, both in the same memory format."""
        ours, theirs = self.rate(layer, name, "adder", form), self.rate(layer, name, other, form)
        return ours / theirs if ours and theirs else None

    def geomean(self) -> dict[str, float]:
        """Geometric means over the layers; the module docstring explains the names."""
        named = {}
        for name in PASSES:
            named[f"{name}_over_conv2d"] = (name, "conv2d", "contiguous")
            named[f"{name}_over_conv2d_channels_last"] = (name, "conv2d", "channels_last")
            named[f"{name}_over_conv2d_best_format"] = (name, "conv2d", "best")
            named[f"{name}_over_conv2d_tf32"] = (name, "conv2d_tf32", "contiguous")
            named[f"{name}_over_conv2d_tf32_best_format"] = (name, "conv2d_tf32", "best")
            named[f"{name}_over_cdist"] = (name, "cdist", "contiguous")
            named[f"{name}_over_eager"] = (name, "eager", "contiguous")
        means = {}
        for title, (name, other, form) in named.items():
            ratios = [self.ratio(layer, name, other, form) for layer in self.layers]
            if ratios and all(ratios):
                means[title] = report.geometric_mean(ratios)
        for name in PASSES:
            shares = [share for (_, passed), share in self._shares.items() if passed == name]
            if shares:
                means[f"{name}_share_of_limit"] = report.geometric_mean(shares)
        return means


def _header() -> str:
    titles = "adder,limit,share,conv2d,ratio,adder cl,conv2d cl,ratio cl,cdist,ratio,eager,ratio"
    return f"{'layer':32}{'pass':8}" + "".join(f"{title:>10}" for title in titles.split(","))


def _line(results: Results, layer: str, name: str) -> str:
    def cell(value: float | None, digits: int = 1) -> str:
        return f"{'-' if value is None else f'{value:.{digits}f}':>10}"

    rate, ratio = results.rate, results.ratio
    ours, share = rate(layer, name, "adder"), results.share(layer, name)
    cells = [cell(ours), cell(ours / share if share else None), cell(share, 2)]
    cells += [cell(rate(layer, name, "conv2d")), cell(ratio(layer, name, "conv2d"), 2)]
    cells += [cell(rate(layer, name, who, "channels_last")) for who in ("adder", "conv2d")]
    cells += [cell(ratio(layer, name, "conv2d", "channels_last"), 2)]
    for peer in ("cdist", "eager"):
        cells += [cell(rate(layer, name, peer), 2), cell(ratio(layer, name, peer))]
    return f"{layer:32}{name:8}" + "".join(cells)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    title, _, text = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=title, epilog=text, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device of all contestants (%(default)s)")
    add("--dtype", choices=[str(dtype).removeprefix("torch.") for dtype in cuda_device.TERMS], default="float32")
    add("--batch", type=int, metavar="N", help="batch size of every layer (64 on cuda, else that of layers.py)")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of every contestant (%(default)s)")
    add("--full", action="store_true", help="every layer, every pass against every peer (20 minutes)")
    add("--seconds", type=float, help="time budget; at least three samples are taken (110; --full: 1000)")
    add("--layers", metavar="PATTERN,...", help="only these layers, such as 'resnet20/*,*.1x1*'")
    add("--passes", metavar="PASS,...", default=",".join(PASSES), help="some of %(default)s")
    add("--csv", type=Path, metavar="FILE", help="write machine, limits and rows to FILE")
    add("--read", type=Path, metavar="FILE", help="time nothing: means and plot of such a FILE")
    add("--plot", type=Path, metavar="FILE.png", help="draw ratios and shares (needs matplotlib)")
    args = parser.parse_args(argv)
    args.passes = args.passes.split(",")
    unknown = [name for name in args.passes if name not in PASSES]
    if unknown:
        parser.error(f"--passes: expected some of {', '.join(PASSES)}, got {', '.join(unknown)}")
    for name in ("threads", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if args.device == "cpu" and args.dtype != "float32":
        parser.error("--dtype: expected float32 on the CPU, where F.conv2d has no 16-bit kernels worth comparing with")
    if args.device == "cuda":
        args.batch = args.batch or 64
    return args


def _register_limits(result: dict, setting: Setting, isa: str) -> dict[str, Together | None]:
    """{pass: loops to time} on this processor; measures all loops once and prints them."""
    try:
        loops = register_limits.measure()
    except register_limits.Unavailable as reason:
        print(f"\nno register-only limits and no shares of them: {reason}")
        return dict.fromkeys(PASSES)
    print(f"\nRegister-only limits\n{register_limits.table(loops)}")
    best = {name: register_limits.best_loop(loops, prefix, isa) for name, prefix in register_limits.PASS_LOOPS.items()}
    threads = torch.get_num_threads()
    limits = {name: Together([best[name]], threads) for name in PASSES if name != "step"}
    limits["step"] = Together([best[name] for name in PASSES if name != "step"], threads)
    result["limits"] = register_limits.rates(loops)
    print("used as limit: " + "; ".join(f"{name}: {loop.name} ({loop.variant})" for name, loop in best.items()))
    return limits


def _model_limits(result: dict, setting: Setting, isa: str) -> dict[str, float | None]:
    """{pass: maximum terms per second} by the model of this GPU, which is printed."""
    rates = cuda_device.bounds(setting.dtype)
    print("\nModel bound of the arithmetic, Gterm/s at the highest clock (cuda_device.py)")
    for name, rate in rates.items():
        print(f"{name:<20} {rate / 1e9:.0f}")
        result["limits"][f"{name} (model)"] = rate / 1e9
    if not rates:
        print("none for this device, and no shares of it")
    return dict.fromkeys(PASSES) | rates


def main(argv: Sequence[str] | None = None, layers: Sequence[Layer] | None = None) -> dict:
    """Runs the benchmark and returns machine, limits, rows and geomean; `layers` overrides the command line's."""
    args = _arguments(argv)
    if args.read:
        return _read(args)
    if args.device == "cuda":
        cuda_device.require()
    if args.plot:
        report.require_matplotlib()
    if layers is None:
        layers = named(args.layers) if args.layers else LAYERS if args.full else DEFAULT_LAYERS
    if args.batch:
        layers = [replace(layer, batch=args.batch) for layer in layers]
    setting = Setting(args.device, getattr(torch, args.dtype))
    torch.set_num_threads(args.threads)
    isa = adderops.info.describe()["instruction set in use"]
    result = {"machine": report.machine(args.threads, isa), "limits": {}, "rows": []}
    result["machine"]["dtype"] = args.dtype
    if args.device == "cuda":
        result["machine"] |= cuda_device.description()
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False
    for name, value in result["machine"].items():
        print(f"{name:<20} {value}")

    limits = (_model_limits if args.device == "cuda" else _register_limits)(result, setting, isa)
    if args.device == "cuda":
        memory = cuda_device.extra_memory(layers, setting.dtype)
    else:
        memory = extra_memory(layers, args.threads)

    print(f"\nGterm/s (cl: channels_last); ratio: adder over the column to its left\n{_header()}", flush=True)
    deadline = time.monotonic() + (args.seconds or (1000 if args.full else 110))
    rows_left = len(layers) * len(args.passes)
    for layer in layers:
        calls = _contestants(layer, args.passes, args.full, setting)
        for name in args.passes:
            budget = max(0.0, deadline - time.monotonic()) / rows_left
            rows = _time_row(layer, name, calls[name], limits[name], budget, setting)
            result["rows"] += rows
            rows_left -= 1
            print(_line(Results(rows), layer.name, name), flush=True)
        _write(args.csv, result)  # layer by layer: a run that is ended early has them

    _summarize(result, args.plot)
    _print_memory(memory, result)
    _write(args.csv, result)
    return result


def _write(file: Path | None, result: dict) -> None:
    if file:
        comments = {f"limit, Gterm/s: {name}": rate for name, rate in result["limits"].items()}
        comments |= {f"mean: {name}": mean for name, mean in Results(result["rows"]).geomean().items()}
        report.write_csv(file, result["machine"] | comments, result["rows"])


def _read(args: argparse.Namespace) -> dict:
    """Means and plot of an earlier run; what `main` returns, without the limits."""
    machine, rows = report.read_csv(args.read)
    result = {"machine": machine, "rows": rows}
    _summarize(result, args.plot)
    return result


def _summarize(result: dict, plot: Path | None) -> None:
    """Prints the geometric means and draws the plot."""
    results = Results(result["rows"])
    result["geomean"] = results.geomean()
    print("\nGeometric means over the layers, terms per second")
    for name, mean in result["geomean"].items():
        print(f"{name:40}{mean:8.2f}")
    if plot:
        _plot(plot, result["machine"], results)


def _print_memory(memory: dict[str, tuple[int, int]] | str, result: dict) -> None:
    """Prints extra and allowed memory per layer and adds them to the rows."""
    print("\nExtra memory of forward + backward (gradients included), MiB; allowed: input + output + weights + 64")
    if isinstance(memory, str):
        print(f"not measured: {memory}")
        return
    for layer, (extra, allowed) in memory.items():
        figures = {"extra_bytes": extra, "allowed_bytes": allowed}
        result["rows"].append({"layer": layer, "pass": "memory", "contestant": "adder"} | figures)
        print(f"{layer:32}{extra / 2**20:10.1f} of {allowed / 2**20:6.1f}{'' if extra < allowed else '   TOO MUCH'}")


def _plot(path: Path, about: dict, results: Results) -> None:
    timed = {row["pass"] for row in results.rows}
    bars = {}
    for name in [name for name in ("forward", "step") if name in timed] or sorted(timed):
        ratios = [results.ratio(layer, name, "conv2d") for layer in results.layers]
        if all(ratios):
            bars[f"{name} / F.conv2d {name}"] = ratios
        shares = [results.share(layer, name) for layer in results.layers]
        if all(shares):
            limit = "model bound" if "device" in about else "register-only limit"
            bars[f"{name} / {limit}"] = shares
    where = about.get("device") or f"{about['cpu']}, {about['instruction_set']}, {about['threads']} threads"
    machine = f"{where}, {about['dtype']}, {about['date'][:10]}"
    title = f"adder convolution, {machine}"
    report.plot_ratios(path, title, results.layers, bars, "ratio of terms per second (contiguous)")


if __name__ == "__main__":
    main()
