# minGPT's character model, 6 layers of 512: 32 epochs over tiny shakespeare's training split, 1,960 iterations.
# $ python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_512.py

out_dir = "out-shakespeare-512"
dataset = "shakespeare_char"
eval_interval = 245
eval_iters = 50
log_interval = 10
sample_interval = 490
sample_prompts = ["It is "]

gradient_accumulation_steps = 1
batch_size = 128
block_size = 128

n_layer = 6
n_head = 8
n_embd = 512
dropout = 0.1
bias = True

learning_rate = 6e-4
min_lr = 6e-5
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
epochs = 32
warmup_iters = 20  # 128 x 128 x 20 tokens
