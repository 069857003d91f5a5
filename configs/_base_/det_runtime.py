_base_ = 'mmdet::_base_/default_runtime.py'

default_hooks = dict(
    # No save_best: it fails at a validation that detects nothing and so has no mAP.
    checkpoint=dict(max_keep_ckpts=3),
    # Stops at the first loss that is NaN or infinite and names the images.
    loss_guard=dict(type='mmdyn.LossGuardHook'),
    # A training that was killed and resumed goes on as if it had not been.
    random_state=dict(type='mmdyn.RandomStateHook'),
)
