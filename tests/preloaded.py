"""What every rank of the pool imports, once, in the process that they are forked from."""

import torch.distributed.checkpoint  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
import torch.distributed.pipelining  # noqa: F401
import torch.distributed.tensor.parallel  # noqa: F401

import train  # noqa: F401
