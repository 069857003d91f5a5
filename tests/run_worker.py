"""Join a group of processes and run a function of a test module: run_worker.py FILE FUNCTION RANK WORLD RENDEZVOUS."""

import os
import runpy
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from mmengine.registry import init_default_scope

file, function, rank, world, rendezvous = sys.argv[1:]
torch.set_num_threads(1)
torch.manual_seed(0)
os.environ['GLOO_SOCKET_IFNAME'] = 'lo'
dist.init_process_group(
    'gloo', init_method=f'file://{rendezvous}', rank=int(rank), world_size=int(world), timeout=timedelta(seconds=60)
)
init_default_scope('mmpretrain')
runpy.run_path(file)[function](int(rank), int(world))
dist.barrier()
# What runs at an ordinary exit may abort the process while gloo's threads still work.
os._exit(0)
