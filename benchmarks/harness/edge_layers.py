"""The layers that bench_edge.py counts: ten dense ones and two depthwise ones of ResNet-8, MobileNet and DS-CNN."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EdgeLayer:
    """A convolution of one image with padding kernel // 2."""

    c_in: int
    c_out: int
    height: int
    width: int
    kernel: int
    stride: int = 1
    depthwise: bool = False

    @property
    def name(self) -> str:
        stride = f"s{self.stride}" if self.stride > 1 else ""
        size = f"{self.height}" if self.height == self.width else f"{self.height}x{self.width}"
        kind = f"dw.{self.c_in}" if self.depthwise else f"{self.c_in}-{self.c_out}"
        return f"{kind}.{self.kernel}x{self.kernel}{stride}@{size}"

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out(self) -> tuple[int, int]:
        """OH, OW."""
        return tuple((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in (self.height, self.width))

    @property
    def terms_of_filter(self) -> int:
        """K."""
        return self.kernel**2 * (1 if self.depthwise else self.c_in)

    @property
    def terms(self) -> int:
        return self.out[0] * self.out[1] * self.c_out * self.terms_of_filter


DENSE = (
    EdgeLayer(16, 16, 32, 32, 3),
    EdgeLayer(16, 32, 32, 32, 3, 2),
    EdgeLayer(32, 32, 16, 16, 3),
    EdgeLayer(32, 64, 16, 16, 3, 2),
    EdgeLayer(64, 64, 8, 8, 3),
    EdgeLayer(16, 32, 32, 32, 1, 2),
    EdgeLayer(32, 64, 16, 16, 1, 2),
    EdgeLayer(64, 64, 12, 12, 1),
    EdgeLayer(128, 128, 6, 6, 1),
    EdgeLayer(64, 64, 25, 5, 1),
)
DEPTHWISE = (EdgeLayer(64, 64, 12, 12, 3, depthwise=True), EdgeLayer(64, 64, 25, 5, 3, depthwise=True))
