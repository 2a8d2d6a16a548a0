"""What torch's batch norm makes of a mean that is large beside the deviation; see SN403.

For each kernel and ratio |mean| / deviation: the variance that train mode stores over the true one,
and the error of the output in train and eval mode, in deviations, root mean square. True values are
those of the float32 input itself, in float64.

    python benchmarks/cancelling_mean.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

RATIOS = (1e2, 1e3, 3e3, 1e4, 3e4, 1e5, 1e6)
KERNELS: dict[str, tuple[tuple[int, ...], torch.memory_format]] = {
    "contiguous, 16 384 values": ((16, 4, 32, 32), torch.contiguous_format),
    "contiguous, 200 704 values": ((64, 4, 56, 56), torch.contiguous_format),
    "channels_last, 512 values": ((8, 64, 8, 8), torch.channels_last),
    "channels_last, 16 384 values": ((16, 4, 32, 32), torch.channels_last),
    "channels_last, 200 704 values": ((64, 4, 56, 56), torch.channels_last),
    "(N, C), 256 values": ((256, 64), torch.contiguous_format),
    "(N, C), 65 536 values": ((65536, 4), torch.contiguous_format),
}


def measure(
    shape: tuple[int, ...], layout: torch.memory_format, ratio: float
) -> tuple[float, float, float]:
    """Return the ratio of variances, and the errors in train and eval mode."""
    x = (torch.randn(shape, dtype=torch.float64) + ratio).float().contiguous(memory_format=layout)
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1], momentum=1.0)
    flat = x.double().movedim(1, 0).flatten(1)  # (C, N * S)
    mean, var = flat.mean(1), flat.var(1)

    def error(y: Tensor) -> float:
        exact = (flat - mean[:, None]) / var.sqrt()[:, None]
        return float((y.double().movedim(1, 0).flatten(1) - exact).square().mean().sqrt())

    in_train = error(norm.train()(x))
    stored = float((norm.running_var.double() / var).mean())
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    return stored, in_train, error(norm.eval()(x))


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, CPU, one thread, float32")
    for name, (shape, layout) in KERNELS.items():
        print(f"\n{name:32}variance    train     eval")
        for ratio in RATIOS:
            with torch.no_grad():
                stored, in_train, in_eval = measure(shape, layout, ratio)
            print(f"{ratio:>31.0e} {stored:9.4g} {in_train:8.1e} {in_eval:8.1e}")


if __name__ == "__main__":
    main()
