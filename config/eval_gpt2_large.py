# The loss of OpenAI's gpt2-large (36 layers of 1280, 774M parameters) on OpenWebText; its weights come from the hub.
# $ python train.py config/eval_gpt2_large.py

init_from = "gpt2-large"
eval_only = True
batch_size = 8
eval_iters = 500  # more than in training, for a figure one can quote
