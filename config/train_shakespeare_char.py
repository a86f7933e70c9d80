# A small character-level model of tiny shakespeare: minutes on a GPU, and on a CPU with a smaller model (README.md).
# $ python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_char.py

out_dir = "out-shakespeare-char"
eval_interval = 250  # often, because so small a text is soon learnt by heart
eval_iters = 200
log_interval = 10

wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # closer to 1 than for GPT-2, because an iteration has few tokens
warmup_iters = 100
