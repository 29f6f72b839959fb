"""Times int8 adder layers against float32 and int8 convolutions, layer by layer and as a whole ResNet-20.

    python benchmarks/bench_int8.py                     three minutes on two cores
    python benchmarks/bench_int8.py --csv r.csv --plot r.png
    python benchmarks/bench_int8.py --read r.csv --plot r.png         means and plot of an earlier run
    python benchmarks/bench_int8.py --device cuda

A layer is one call from uint8 to uint8: the adder with scale, ReLU and rounding; `F.conv2d` in float32, the faster of
both memory formats; QLinearConv of onnxruntime and torch's own int8 convolution, the faster of which is "the best int8
convolution".  The network is ResNet-20 on 32x32 RGB images with random weights, from float32 images to logits.
Contestants take turns and are compared by their medians (harness/timing.py).  Each sample starts with a pause and an
untimed call and lasts 20 ms, because one library's worker threads keep spinning for a while into the next one's turn.

`share` is the adder's share of the limit: the same sums from registers and L1 alone, on as many threads
(harness/register_limits.py).

On a GPU there is no limit, and neither library has int8 convolutions: cuDNN's in float32, without TF32, and in float16
are the peers.  Times are those of harness/cuda_device.py.

The CSV file starts with the machine, its limits (Gterm/s on one thread), the missing contestants and the means as
comments.  A row has layer or network, contestant, memory_format, batch, seconds, spread, samples and gterm_per_s or
images_per_s.  The means are over_conv2d, over_conv2d_float16, over_int8_conv2d, over_onnxruntime, over_torch_int8,
share_of_limit, resnet20_over_onnxruntime_int8, resnet20_over_cnn_float32, resnet20_over_cnn_float16 and
resnet20_over_adder_float32.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import cuda_device, int8_peers, register_limits, report
from harness.layers import DEFAULT_LAYERS, LAYERS, Layer, named
from harness.timing import Contestant, take_turns
from torch import Tensor

import adderops.info
from adderops import reference
from adderops.functional import adder_conv2d_int8
from adderops.models import resnet20
from adderops.quant import calibrate, convert, reestimate_batchnorm

PAUSE = SAMPLE = 0.02  # seconds; shorter samples would measure how fast pool threads wake up
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ADDER, CONV, ORT, TORCH = "adder int8", "conv2d float32", "onnxruntime int8", "torch int8"
CONV16 = "conv2d float16"  # on a GPU


def _clock(call: Callable[[], object], device: str, unit: str) -> Callable[[int], float]:
    if device == "cuda":
        head_start = cuda_device.HEAD_START if unit == "gterm_per_s" else cuda_device.OF_A_NETWORK
        return cuda_device.device_clock(call, head_start)

    def measure(repeats: int) -> float:
        time.sleep(PAUSE)
        call()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - start

    return measure


def _bytes_of(layer: Layer) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (layer.batch, layer.c_in, layer.size, layer.size), generator=generator)
    w = torch.randint(0, 256, (layer.c_out, layer.c_in, layer.kernel, layer.kernel), generator=generator)
    return x.byte(), w.byte()


def _adder_call(layer: Layer, device: str) -> Callable[[], Tensor]:
    """One call from uint8 to uint8; its result is checked here."""
    x, w = _bytes_of(layer)
    terms = w[0].numel()
    scale = torch.full((layer.c_out,), 8 / (256 * terms**0.5))
    offset = 128 + scale * 85 * terms
    geometry = {"stride": layer.stride, "padding": layer.padding}
    epilogue = {"scale": scale.to(device), "offset": offset.to(device), "relu": True, "dtype": torch.uint8}
    images, weights = (t.to(device, memory_format=torch.channels_last) for t in (x, w))
    y = adder_conv2d_int8(images, weights, **epilogue, **geometry)
    sides = [layer.padding] * 4
    sample = reference.adder_conv2d_int8(
        x[:1], w[:8], scale[:8], offset[:8], relu=True, quantize=True, stride=[layer.stride] * 2, padding=sides
    )
    if not torch.equal(y[:1, :8].cpu(), sample):
        raise SystemExit(f"{layer.name} {ADDER}: wrong result")
    return lambda: adder_conv2d_int8(images, weights, **epilogue, **geometry)


def _layer_calls(layer: Layer, threads: int, device: str, missing: dict[str, str]) -> dict[tuple[str, str], Callable]:
    calls: dict[tuple[str, str], Callable] = {(ADDER, "channels_last"): _adder_call(layer, device)}
    for name, memory_format in FORMATS.items():
        for conv, dtype in ((CONV, torch.float32), *([(CONV16, torch.float16)] if device == "cuda" else [])):
            x, w, _ = (t.to(device, dtype) for t in layer.tensors(memory_format))
            calls[conv, name] = lambda x=x, w=w: F.conv2d(x, w, stride=layer.stride, padding=layer.padding)
    if device == "cuda":
        return calls
    x, w = _bytes_of(layer)
    w = (w // 2).to(torch.int8) - 64  # 7 bits: without VNNI the sum of two 8-bit products saturates
    want = int8_peers.convolution_of_integers(layer, x[:1], w)
    for name, form, make in (
        (ORT, "contiguous", lambda: int8_peers.onnxruntime_layer(layer, x, w, threads)),
        (TORCH, "channels_last", lambda: int8_peers.torch_layer(layer, x, w)),
    ):
        try:
            call = make()
        except int8_peers.Unavailable as reason:
            missing[name] = str(reason)
            continue
        got = call()
        got = torch.from_numpy(got) if name == ORT else got.int_repr()
        if (got[:1].double() - want).abs().max() > 1:
            raise SystemExit(f"{layer.name} {name}: wrong result")
        calls[name, form] = call
    return calls


def _network_calls(batch: int, threads: int, device: str, missing: dict[str, str]) -> dict[tuple[str, str], Callable]:
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 32, 32)
    adder = reestimate_batchnorm(resnet20("adder"), [images]).eval()
    cnn = reestimate_batchnorm(resnet20("cnn"), [images]).eval()
    integer = convert(calibrate(copy.deepcopy(adder), [images]), images)
    calls: dict[tuple[str, str], Callable] = {}
    for form, memory_format in FORMATS.items():
        x = images.to(device, memory_format=memory_format)
        for name, network in ((ADDER, integer), ("cnn float32", cnn), ("adder float32", adder)):
            model = copy.deepcopy(network).to(device).to(memory_format=memory_format)
            calls[name, form] = lambda model=model, x=x: model(x)
        if device == "cuda":
            halved, half = copy.deepcopy(cnn).to(device, torch.float16).to(memory_format=memory_format), x.half()
            calls["cnn float16", form] = lambda halved=halved, half=half: halved(half)
    if device == "cuda":
        return calls
    try:
        calls[ORT, "contiguous"] = int8_peers.onnxruntime_network(cnn, images, threads)
    except int8_peers.Unavailable as reason:
        missing[ORT] = str(reason)
    return calls


def _rows(label: dict, calls: dict, work: float, unit: str, limit, budget: float, device: str) -> list[dict]:
    players = {key: Contestant(" ".join(key), work, _clock(call, device, unit)) for key, call in calls.items()}
    if limit is not None:
        players["limit", "registers"] = Contestant("limit", limit.terms, limit.seconds)
    timings = take_turns(list(players.values()), budget, cuda_device.SAMPLE if device == "cuda" else SAMPLE)
    rows = []
    for (name, form), player in players.items():
        timing = timings[player.name]
        rows.append(
            label
            | {"contestant": name, "memory_format": form, "seconds": timing.seconds, "spread": timing.spread}
            | {"samples": timing.samples, unit: player.terms / timing.seconds / (1e9 if unit == "gterm_per_s" else 1)}
        )
    return rows


class Results:
    """Rates by layer and contestant, each in its faster memory format, and their ratios."""

    def __init__(self, rows: Sequence[dict]) -> None:
        self.layers = list(dict.fromkeys(row["layer"] for row in rows if "layer" in row))
        self._rates: dict[tuple[str, str], float] = {}
        for row in rows:
            key = row.get("layer", row.get("network")), row["contestant"]
            rate = row.get("gterm_per_s", row.get("images_per_s"))
            self._rates[key] = max(rate, self._rates.get(key, 0.0))

    def rate(self, what: str, *contestants: str) -> float | None:
        """The rate of the fastest of the contestants; None if none took part."""
        return max((r for c in contestants if (r := self._rates.get((what, c)))), default=None)

    def ratio(self, what: str, *others: str) -> float | None:
        ours, theirs = self.rate(what, ADDER), self.rate(what, *others)
        return ours / theirs if ours and theirs else None

    def geomean(self) -> dict[str, float]:
        named = {
            "over_conv2d": (CONV,),
            "over_conv2d_float16": (CONV16,),
            "over_int8_conv2d": (ORT, TORCH),
            "over_onnxruntime": (ORT,),
            "over_torch_int8": (TORCH,),
            "share_of_limit": ("limit",),
        }
        means = {}
        for title, others in named.items():
            ratios = [self.ratio(layer, *others) for layer in self.layers]
            if ratios and all(ratios):
                means[title] = report.geometric_mean(ratios)
        for title, other in (
            ("resnet20_over_onnxruntime_int8", ORT),
            ("resnet20_over_cnn_float32", "cnn float32"),
            ("resnet20_over_cnn_float16", "cnn float16"),
            ("resnet20_over_adder_float32", "adder float32"),
        ):
            ratio = self.ratio("resnet20", other)
            if ratio:
                means[title] = ratio
        return means


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    title, _, text = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=title, epilog=text, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device of all contestants (%(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of every contestant (%(default)s)")
    add("--batch", type=int, default=64, help="batch size of the network, on cuda of the layers too (%(default)s)")
    add("--full", action="store_true", help="every layer of layers.py")
    add("--layers", metavar="PATTERN,...", help="only these layers, such as 'resnet20/*,*.1x1*'")
    add("--seconds", type=float, default=120, help="time budget (%(default)s)")
    add("--csv", type=Path, metavar="FILE", help="write machine, limits and rows to FILE")
    add("--read", type=Path, metavar="FILE", help="time nothing: means and plot of such a FILE")
    add("--plot", type=Path, metavar="FILE.png", help="draw the ratios (needs matplotlib)")
    args = parser.parse_args(argv)
    for name in ("threads", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    return args


@torch.inference_mode()
def main(argv: Sequence[str] | None = None, layers: Sequence[Layer] | None = None) -> dict:
    """Runs the benchmark and returns machine, limits, rows, missing, geomean; `layers` overrides the command line's."""
    args = _arguments(argv)
    if args.plot:
        report.require_matplotlib()
    if args.read:
        machine, rows = report.read_csv(args.read)
        result = {"machine": machine, "rows": rows}
        _summarize(result, args.plot)
        return result
    if args.device == "cuda":
        cuda_device.require()
    if layers is None:
        layers = named(args.layers) if args.layers else LAYERS if args.full else DEFAULT_LAYERS
        if args.device == "cuda":
            layers = [replace(layer, batch=args.batch) for layer in layers]
    torch.set_num_threads(args.threads)
    isa = adderops.info.describe()["instruction set in use"]
    result: dict = {"machine": report.machine(args.threads, isa), "limits": {}, "rows": [], "missing": {}}
    if args.device == "cuda":
        result["machine"] |= cuda_device.description()
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False
    print("\n".join(f"{key:<16}{value}" for key, value in result["machine"].items()))
    limit = None
    try:
        if args.device == "cuda":
            raise register_limits.Unavailable("the loops are those of a processor")
        loops = register_limits.measure()
        best = register_limits.best_loop(loops, register_limits.PASS_LOOPS["int8"], isa)
        limit = register_limits.Together([best], args.threads)
        result["limits"] = register_limits.rates(loops)
        print(f"limit           {best.name} ({best.variant}), {best.rate / 1e9:.0f} Gterm/s per thread")
    except register_limits.Unavailable as reason:
        print(f"no register-only limit and no share of it: {reason}")

    others = {CONV: "conv2d"} | ({CONV16: "float16"} if args.device == "cuda" else {ORT: "onnxrt", TORCH: "torch i8"})
    titles = ["adder", "limit", "share", *(title for other in others.values() for title in (other, "ratio"))]
    print(f"\nGterm/s{'':25}" + "".join(f"{title:>10}" for title in titles))
    budget = args.seconds / (len(layers) + 2)
    for layer in layers:
        calls = _layer_calls(layer, args.threads, args.device, result["missing"])
        label = {"layer": layer.name, "batch": layer.batch, "terms": layer.terms}
        rows = _rows(label, calls, layer.terms, "gterm_per_s", limit, budget, args.device)
        result["rows"] += rows
        shown = Results(rows)
        cells = [shown.rate(layer.name, ADDER), shown.rate(layer.name, "limit"), shown.ratio(layer.name, "limit")]
        for other in others:
            cells += [shown.rate(layer.name, other), shown.ratio(layer.name, other)]
        print(f"{layer.name:32}" + "".join(_cell(value) for value in cells), flush=True)
        _write(args.csv, result)  # layer by layer: a run that is ended early has them

    calls = _network_calls(args.batch, args.threads, args.device, result["missing"])
    label = {"network": "resnet20", "batch": args.batch}
    result["rows"] += _rows(label, calls, args.batch, "images_per_s", None, 2 * budget, args.device)
    print(f"\nResNet-20, batch {args.batch}, images/s")
    for row in result["rows"]:
        if "network" in row:
            print(f"{row['contestant']:18}{row['memory_format']:15}{row['images_per_s']:10.0f}")
    for name, reason in result["missing"].items():
        print(f"{name} did not take part: {reason}")

    _summarize(result, args.plot)
    _write(args.csv, result)
    return result


def _write(file: Path | None, result: dict) -> None:
    if file:
        comments = {f"limit, Gterm/s: {name}": rate for name, rate in result["limits"].items()}
        comments |= {f"missing: {name}": reason for name, reason in result["missing"].items()}
        comments |= {f"mean: {name}": mean for name, mean in Results(result["rows"]).geomean().items()}
        report.write_csv(file, result["machine"] | comments, result["rows"])


def _summarize(result: dict, plot: Path | None) -> None:
    """Prints the geometric means and draws the plot."""
    results = Results(result["rows"])
    result["geomean"] = results.geomean()
    print("\nint8 adder over the others, geometric means over the layers")
    print("\n".join(f"{title:34}{value:.2f}" for title, value in result["geomean"].items()))
    if plot:
        _plot(plot, results, result["machine"])


def _cell(value: float | None) -> str:
    if value is None:
        return f"{'-':>10}"
    return f"{value:>10.{0 if value >= 20 else 2}f}" if math.isfinite(value) else f"{'?':>10}"


def _plot(path: Path, results: Results, machine: dict) -> None:
    bars = {}
    for title, others in (
        ("over conv2d float32", (CONV,)),
        ("over conv2d float16", (CONV16,)),
        ("over the best int8 convolution", (ORT, TORCH)),
    ):
        ratios = [results.ratio(layer, *others) for layer in results.layers]
        if all(ratios):
            bars[title] = ratios
    shares = [results.ratio(layer, "limit") for layer in results.layers]
    if all(shares):
        bars["share of the limit"] = shares
    where = machine.get("device") or f"{machine['cpu']}, {machine['threads']} threads"
    title = f"int8 adder layers, {where}, {machine['date'][:10]}"
    report.plot_ratios(path, title, results.layers, bars, "terms per second, ratio")


if __name__ == "__main__":
    main()
