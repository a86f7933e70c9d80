# What `make demo` trains: a million parameters on the embedded Chinese stories, two minutes on two CPU cores.
# $ python data/chinese/prepare.py
# $ python train.py config/demo_chinese.py

out_dir = "out-demo"
dataset = "chinese"
eval_interval = 150
eval_iters = 20
log_interval = 20
sample_interval = 150
sample_prompts = ["《"]
sample_tokens = 60

gradient_accumulation_steps = 1
batch_size = 16
block_size = 128

# a newer architecture than GPT-2's (docs/speedruns.md says what each of these is worth)
n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.1  # a small text is soon learnt by heart
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
learning_rate = 0.01  # of embeddings and head
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.0
grad_clip = 0.0
lr_schedule = "linear"
max_iters = 600
lr_decay_iters = 600
min_lr = 0.0
warmup_iters = 0

device = "cpu"
compile = False  # two minutes are too short to win back the time of compiling
