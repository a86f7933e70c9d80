# A novel by characters, on a CPU (docs/speedruns.md): 红楼梦, or any other in novel.txt.
# $ python data/chinese/prepare.py --input=novel.txt --dest=data/novel
# $ python train.py config/speedrun_chinese.py

out_dir = "out-speedrun-chinese"
dataset = "novel"
eval_interval = 0
eval_iters = 100000  # the whole of both splits
log_interval = 10

gradient_accumulation_steps = 1
batch_size = 16
block_size = 128

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
muon_momentum = 0.95
muon_momentum_warmup = 100
learning_rate = 0.01
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.0
grad_clip = 0.0
max_iters = 374  # each training character of 红楼梦 once
lr_decay_iters = 374
lr_schedule = "linear"
warmup_iters = 0
min_lr = 0.0

device = "cpu"
compile = False
