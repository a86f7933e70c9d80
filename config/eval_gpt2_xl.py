# The loss of OpenAI's gpt2-xl (48 layers of 1600, 1558M parameters) on OpenWebText; its weights come from the hub.
# $ python train.py config/eval_gpt2_xl.py

init_from = "gpt2-xl"
eval_only = True
batch_size = 8
eval_iters = 500  # more than in training, for a figure one can quote
