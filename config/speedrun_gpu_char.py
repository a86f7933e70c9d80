# nanoGPT's character model for a GPU, to the validation loss of its README, 1.4697, in fewer steps (docs/speedruns.md).
# $ python data/shakespeare_char/prepare.py
# $ python train.py config/speedrun_gpu_char.py

out_dir = "out-speedrun-gpu-char"
dataset = "shakespeare_char"
target_val_loss = 1.4697
eval_interval = 50
eval_iters = 20
log_interval = 10

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
act = "relu2"
pos = "rope"
norm = "rmsnorm"
qk_norm = True
tied = False
zero_init = True
smear = 3

optim = "muon"
muon_learning_rate = 0.03
muon_momentum = 0.95
muon_momentum_warmup = 100
learning_rate = 0.01
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.0
grad_clip = 0.0
max_iters = 600
lr_decay_iters = 600
lr_schedule = "linear"
warmup_iters = 0
min_lr = 0.0
