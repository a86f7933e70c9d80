# What `make demo` trains: a million parameters on the embedded Chinese stories, two minutes on two CPU cores.
# $ python data/chinese/prepare.py
# $ python train.py config/demo_chinese.py

out_dir = "out-demo"
dataset = "chinese"
eval_interval = 275
eval_iters = 20
log_interval = 20
sample_interval = 275
sample_prompts = ["《"]
sample_tokens = 60

gradient_accumulation_steps = 1
batch_size = 16
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

learning_rate = 3e-3
max_iters = 1100
lr_decay_iters = 1100
min_lr = 0.0
warmup_iters = 50
beta2 = 0.99

device = "cpu"
compile = False  # two minutes are too short to win back the time of compiling
