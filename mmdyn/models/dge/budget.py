"""The budget constraint (DGE paper, section 3.2.3)."""
import torch
import torch.distributed as dist
from torch import Tensor


def mean_over_processes(ratios: Tensor) -> Tensor:
    """Mean of the ratios of the images of all processes.

    The backward pass needs no communication: the value is the global mean, the gradient is that of the local images,
    scaled so that the average of all processes' gradients, which data parallel training takes, is the gradient of the
    global mean.

    Args:
        ratios: (B,) of this process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ratios.mean()
    total = torch.stack([ratios.detach().sum(), ratios.new_tensor(len(ratios))])
    dist.all_reduce(total)
    local = ratios.sum() * dist.get_world_size() / total[1]
    return local + (total[0] / total[1] - local).detach()


def budget_loss(ratio: Tensor, budget: float) -> Tensor:
    """Eq. 8: the squared distance of the spent share beta from the budget gamma."""
    return (ratio - budget)**2
