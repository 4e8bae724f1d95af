"""Writes versions, hardware and the GPU's own figures as JSON; never a path, a host name or a user name."""

import json
import sys
from pathlib import Path

import torch

from fp8repro.bench.gpu import describe_machine
from fp8repro.training.environment import describe_environment


def main() -> None:
    """Write them to the file that is named."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = describe_environment() | {"measured_on": describe_machine(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["capability"] = list(torch.cuda.get_device_capability(device))
        found["memory_bytes"], found["multiprocessors"] = properties.total_memory, properties.multi_processor_count
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
    print(", ".join(found["measured_on"].values()))


if __name__ == "__main__":
    main()
