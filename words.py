"""What the page says, in Chinese and in English."""

STORIES = 6  # beside each other at most
WORDS = {
    "switch": ("English", "中文"),
    "talk_tab": ("对话", "Chat"),
    "write_tab": ("写作", "Write"),
    "tokens_tab": ("概率", "Probabilities"),
    "run_tab": ("训练过程", "Training run"),
    # conversation
    "talk_hint": ("和模型说点什么吧", "Say something to the model"),
    "you": ("你", "You"),
    "model": ("模型", "Model"),
    "question": ("要说的话", "Message"),
    "question_hint": ("回车发送，Shift+回车换行", "Enter sends, Shift+Enter breaks the line"),
    "send": ("发送", "Send"),
    "again": ("重新回答", "Answer again"),
    "new_talk": ("新对话", "New conversation"),
    # writing
    "title": ("标题", "Title"),
    "title_hint": ("可以留空", "may stay empty"),
    "opening": ("开头", "Opening"),
    "opening_hint": ("留空就由模型从头写起", "leave it empty, and the model begins"),
    "length": ("长度（词元数）", "Length (tokens)"),
    "samples": ("写几篇", "Number of samples"),
    "top_k": ("Top-k：只在最可能的 k 个里选（0：不限）", "Top-k: only among the k likeliest (0: all)"),
    "top_p": ("Top-p：只在合计概率达到 p 的里选（1：不限）", "Top-p: among the likeliest that make up p (1: all)"),
    "temperature": ("温度：越高越随意（0：总选最可能的）", "Temperature: higher is freer (0: always the likeliest)"),
    "penalty": ("重复惩罚：越大越少重复（1：没有）", "Repetition penalty: higher repeats less (1: none)"),
    "seed": ("随机种子：相同则结果相同（-1：每次不同）", "Seed: the same, the same text (-1: another each time)"),
    "write": ("开始写", "Write"),
    "stop": ("停止", "Stop"),
    "copy": ("复制", "Copy"),
    "copied": ("已复制：{story}", "copied: {story}"),
    "go_on": ("接着写", "Continue from here"),
    "story": ("作品", "Text"),
    "story_hint": ("写出的文字在这里；可以修改，再让模型接着写", "The text appears here; edit it, and go on"),
    "figures": ("{seconds:.1f} 秒 · {tokens} 个词元 · 种子 {seed}", "{seconds:.1f} s · {tokens} tokens · seed {seed}"),
    "running": ("正在写 · ", "writing · "),
    "done": ("写完了 · ", "done · "),
    "stopped": ("已停止 · ", "stopped · "),
    "waiting": ("排队中，前面还有 {ahead} 个 · {seconds:.1f} 秒", "waiting, {ahead} before this · {seconds:.1f} s"),
    "unseen": (" · 太长了，模型只看最后 {context} 个词元", " · too long: the model sees the last {context} tokens"),
    "full": ("排队的人太多，请 {wait} 秒后再试", "too many are waiting: try again in {wait} s"),
    "closing": ("服务器正在关闭，不再接受新的请求", "the server is shutting down and takes no new requests"),
    "failed": ("出错了，详情见服务器的终端", "something went wrong; the server's terminal says what"),
    # probabilities
    "text": ("要分析的文字", "Text to look into"),
    "take": ("取第一篇作品", "Take the first text"),
    "show": ("显示概率", "Show the probabilities"),
    "scored_hint": (
        "把鼠标移到一个词元上，或者点一下，就能看到模型当时更想写什么",
        "Point at a token, or tap it, to see what the model would rather have written",
    ),
    "likelier": ("{percent}，第 {rank} 可能", "{percent}, rank {rank}"),
    "rare": ("{percent}，不在前 {shown} 名", "{percent}, not among the first {shown}"),
    "first": ("开头，没有概率", "the beginning, which has no probability"),
    "cut": ("只显示最后 {shown} 个词元。", "Only the last {shown} tokens are shown."),
    "surprise": (
        "每词元 {nats:.2f} 纳特（困惑度 {perplexity:.1f}）",
        "{nats:.2f} nats a token (perplexity {perplexity:.1f})",
    ),
    # the run
    "against": ("横轴", "Against"),
    "step": ("步数", "steps"),
    "tokens": ("词元数", "tokens"),
    "seconds": ("训练秒数", "seconds"),
    "loss": ("损失（纳特/词元）", "Loss (nats a token)"),
    "train": ("训练", "train"),
    "val": ("验证", "validation"),
    "lr": ("学习率", "Learning rate"),
    "speed": ("每秒词元数", "Tokens a second"),
    "zoom_hint": ("在图上拖动可放大，双击复原。", "Drag across a plot to zoom in, double-click to come back."),
    "drawn": ("训练途中的样本", "Samples along the way"),
    "drawn_at": ("第 {iter} 步", "after {iter} steps"),
    "newest": ("第 {step} 步，最好的验证损失 {best}", "{step} steps, best validation loss {best}"),
    "no_log": (
        "这里没有训练记录（log.jsonl）：它在训练时写在 out_dir 里",
        "There is no log.jsonl here, which training writes into its out_dir",
    ),
}  # fmt: skip


def words(lang: str) -> dict[str, str]:
    """All of them in 'zh' or 'en'."""
    said = {key: both[lang != "zh"] for key, both in WORDS.items()}
    return said | {f"story_{k}": f"{said['story']} {k}" for k in range(1, STORIES + 1)}
