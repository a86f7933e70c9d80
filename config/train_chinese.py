# A character-level model of a Chinese text, such as a novel of your own (README.md): a GPU, or a CPU and patience.
# $ python data/chinese/prepare.py --input=novel.txt
# $ python train.py config/train_chinese.py

out_dir = "out-chinese"
dataset = "chinese"
eval_interval = 250
eval_iters = 100
log_interval = 10
sample_interval = 500
sample_prompts = ["\n"]

gradient_accumulation_steps = 1
batch_size = 32
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # a novel is a small text: without dropout it is soon learnt by heart

learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
