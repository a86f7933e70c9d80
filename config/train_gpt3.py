# GPT-3 Small by its paper (Brown et al. 2020: tables 2.1 and 2.2, appendix B), 300 billion tokens; not measured.
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt3.py
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt3.py --model_size=gpt3-1.3b --batch_size=2
# $ python train.py config/train_gpt3.py --dataset=openwebtext --max_tokens=3e9 --lr_decay_tokens=2.6e9 \
#       --warmup_tokens=3.75e6 --batch_ramp_tokens=40e6
#
# Another size brings its own batch and learning rate; what it takes: python extras/plan.py --model_size=gpt3-1.3b

out_dir = "out-gpt3"
model_size = "gpt3-125m"
attn_pattern = "dense,banded"
attn_window = 256  # GPT-3's is not published; this is GPT-Neo's

# Table 2.2: how much of each is read, whatever its size, in percent (they add up to 101 there; they need not to 100).
# Filtered Common Crawl is read 0.44 times, Wikipedia 3.4 times. OpenAI's texts were not published: put your own into
# these folders of data/, all with GPT-2's tokenizer, which data/hf/prepare.py writes.
dataset = "common_crawl:60,webtext2:22,books1:8,books2:8,wikipedia:3"

batch_size = 8  # sequences of 2048 in a micro-step; the 0.5M tokens of an iteration come with the size
batch_ramp_start = 32768
batch_ramp_tokens = 4e9  # GPT-3's took 4 to 12 billion, "depending on the model size"

# by tokens: up over 375 million, down to a tenth at 260 billion, and so to the end
warmup_tokens = 375e6
lr_decay_tokens = 260e9
max_tokens = 300e9

weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
adam_eps = 1e-8
grad_clip = 1.0

eval_interval = 1000
eval_iters = 200
log_interval = 10
save_interval = 250
