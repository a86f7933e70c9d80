# nanoGPT's model for a CPU, to the loss that nanoGPT reaches with it, in a fraction of the time (docs/speedruns.md).
# $ python data/shakespeare_char/prepare.py
# $ python train.py config/speedrun_cpu_char.py

out_dir = "out-speedrun-cpu-char"
dataset = "shakespeare_char"
target_val_loss = 1.898  # nanoGPT's after 2,000 iterations, on the whole validation split
eval_interval = 0  # the loss gets there when the rates come to zero, and not before
eval_iters = 20
log_interval = 10

gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
act = "relu2"
pos = "rope"
norm = "rmsnorm"
qk_norm = True
tied = False
zero_init = True
smear = 3

optim = "muon"
muon_learning_rate = 0.03
muon_momentum = 0.9
muon_momentum_warmup = 0
learning_rate = 0.02
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.0
grad_clip = 0.0
max_iters = 134
lr_decay_iters = 134
lr_schedule = "linear"
warmup_iters = 0
min_lr = 0.0

device = "cpu"
compile = False  # costs more than the run
