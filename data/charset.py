"""Which encoding a file is in, and its decoder.

Notable choices:
- What is strictly UTF-8 is UTF-8. What is not is GB18030, Big5 or UTF-16, whichever makes everyday characters of it:
  in the right encoding two of three are, in a wrong one less than one of ten. Only Korean, whose bytes are those of
  common Chinese characters, and Japanese come closer, so they are looked for. A detector's guess about any other
  encoding is only told: taken for granted, it would corrupt a text without a word.
- Names that stand for a smaller set in Python than in the files so called mean the larger one (SUPERSETS).
"""

import codecs
import re
from contextlib import suppress
from functools import cache

from configurator import UserError

SAMPLE = 2**16  # bytes, from the first that is not ASCII, by which an encoding is told
BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"), (b"\x84\x31\x95\x33", "gb18030"))  # fmt: skip
UTF_16 = ("utf-16-le", "utf-16-be")
CHINESE = ("gb18030", "big5", "big5hkscs", *UTF_16)
UTF_8_RUN, RUN = re.compile(rb"(?:[\xe4-\xe9][\x80-\xbf]{2}){6}"), 18  # six Chinese characters, and how long that is
SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "big5": "cp950"}  # as browsers read them
MARK = "weigpt-mark"  # a way to treat errors: see _mark

EVERYDAY = set(  # the characters most in use, and their traditional forms: two of three in any Chinese text
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家"
    "种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十"
    "民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯"
    "月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员解水名真论处走义各入几口认条平系气题活尔更别打女"
    "变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基"
    "眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确传师观清今"
    "切院让识候带导争运曰爷叫兵言夫官众若玉往笑宝请城吃李酒坐云兄亲花娘百父令房连送姐母早忙夜朝故随八七六九呢吗吧春风"
    "雨火车飞跑找红黑黄呀服怕谢快块客字写站齐半步乃吾亦矣這個們來爲國說時會對於過發後裏種經麼學現當沒動還進樣開從實軍"
    "無與長機關點業將兩間問並應戰頭體見產話內給門兒東聲員論處義幾認條氣題爾別變總電數報結務場計資許統區隊決馬書則聽卻"
    "達強難權設記類據邊張該規萬覺術領確傳師觀讓識帶導爭運爺衆寶請喫雲親連隨嗎風車飛紅黃謝塊寫齊裡纔"
)
EVERYDAY |= set("，。、：；？！“”‘’「」『』《》〈〉（）【】—…·﹐\u3000\ufeff")


def check_encoding(encoding: str) -> None:
    """UserError where there is no such encoding of text."""
    try:
        if encoding != "auto":
            codecs.getincrementaldecoder(encoding)
            "a".encode(encoding)
    except (LookupError, UnicodeError, ValueError, TypeError) as error:
        known = "auto, utf-8, gb18030, big5 or utf-16"
        raise UserError(f"--encoding={encoding}: no such text encoding; try {known}") from error


def decoder_of(encoding: str, errors: str) -> codecs.IncrementalDecoder:
    """Its decoder; `errors` is "stop", "skip" (bytes become lone surrogates, see _mark), or one of Python's ways."""
    encoding = SUPERSETS.get(codecs.lookup(encoding).name, encoding)
    return codecs.getincrementaldecoder(encoding)({"stop": "strict", "skip": MARK}.get(errors, errors))


def _mark(error: UnicodeError) -> tuple[str, int]:
    """For every byte that cannot be decoded, half a surrogate pair, which no text has."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\udcff" * (error.end - error.start), error.end


codecs.register_error(MARK, _mark)


def encoding_of(data: bytes, file: object, first: bool) -> str:
    """The encoding of a file by a part of it that is not ASCII; `first` tells whether that is its beginning. UserError
    where it cannot be told."""
    if first:
        for mark, name in BOMS:
            if data.startswith(mark):
                return name
        if b"\0" in data[:SAMPLE]:  # which ASCII is full of in UTF-16
            best = max(UTF_16, key=lambda name: _sense(data, name))
            if _sense(data, best) >= 0.6:
                return best
    begin = next((i for i in range(0, len(data), 64) if not data[i : i + 64].isascii()), len(data))
    begin = next((i for i in range(begin, len(data)) if data[i] >= 0x80), len(data))
    sample = data[begin : begin + SAMPLE]
    with suppress(UnicodeDecodeError):
        codecs.getincrementaldecoder("utf-8")().decode(sample)
        return "utf-8"
    readings = {name: _beyond(sample, name) for name in CHINESE[:3]}
    readings |= {name: _beyond(data[:SAMPLE], name) for name in UTF_16 if first}
    shares = {name: _share(characters, EVERYDAY) for name, characters in readings.items()}
    best = max(readings, key=lambda name: (shares[name], -readings[name].count("\ufffd")))
    if shares[best] >= 0.4:
        return best
    valid = [character.encode("utf-8") for character in _beyond(sample, "utf-8") if "~" < character != "\ufffd"]
    high = sum(byte >= 0x80 for byte in sample)
    if len(b"".join(valid)) >= 0.9 * high or sum(len(c) for c in valid if len(c) > 2) >= 0.6 * high:
        return "utf-8"  # with a few bytes that are not
    if shares[best] >= 0.1 and _share(readings[best], _common()) >= 0.75 and not _is_foreign(sample):
        return best
    try:
        import charset_normalizer

        match = charset_normalizer.from_bytes(data[: 2**14]).best()
        guess = f" (charset-normalizer's guess is {match.encoding})" if match else ""
    except ImportError:
        guess = ""
    raise UserError(
        f"{file}: its encoding is neither UTF-8 nor, in Chinese, GB18030, Big5 or UTF-16{guess}: name it with "
        "--encoding=, or save the file as UTF-8"
    )


def named(encoding: str, data: bytes) -> str:
    """The encoding that the user names; with its order of bytes where it is UTF-16 or UTF-32 without a mark."""
    name = codecs.lookup(encoding).name
    if name in ("utf-16", "utf-32") and not data.startswith(tuple(mark for mark, of in BOMS if of == name)):
        return max((f"{name}-le", f"{name}-be"), key=lambda order: _sense(data, order))
    return encoding


def decoded(data: bytes, encoding: str) -> str:
    """The text of the bytes, but for a character that is cut off at their end."""
    return decoder_of(encoding, "replace").decode(data)


def _beyond(data: bytes, encoding: str) -> list[str]:
    """The characters, of those that this encoding makes of the bytes, that are no ASCII text."""
    return [c for c in decoded(data, encoding) if c > "~" or c < " " and c not in "\t\n\f\r"]


def _sense(data: bytes, encoding: str) -> float:
    """How many of the characters that this encoding makes of the bytes are ASCII text or everyday ones, as a share."""
    text = decoded(data[:SAMPLE], encoding)
    return sum(" " <= c <= "~" or c in "\t\n\r" or c in EVERYDAY for c in text) / (len(text) + 1)


def _share(characters: list[str], known: set[str]) -> float:
    return sum(c in known for c in characters) / (len(characters) + 2)  # of one or two, none can be sure


def _is_foreign(sample: bytes) -> bool:
    """Whether it is of a language and in an encoding whose bytes are those of common Chinese characters."""
    languages = (("euc_kr", "가", "힣", 0.8), ("euc_jp", "ぁ", "ヺ", 0.3), ("koi8_r", "А", "я", 0.9))
    for encoding, first, last, share in languages:
        characters = _beyond(sample, encoding)
        if sum(first <= c <= last for c in characters) >= share * len(characters):
            return True
    return False


@cache
def _common() -> set[str]:
    """Level 1 of GB 2312 and of Big5, which are the characters in daily use, and Chinese punctuation."""
    levels = (("gb2312", 0xB0A1, 0xD7F9), ("big5", 0xA440, 0xC67E))
    common = {chr(c) for c in (*range(0x3000, 0x3020), *range(0xFF01, 0xFF5F), 0xB7)} | EVERYDAY
    for encoding, first, last in levels:
        pairs = [bytes(divmod(code, 256)) for code in range(first, last + 1) if code % 256 >= 0x40]
        common |= {pair.decode(encoding, "ignore") for pair in pairs}
    return common - {""}
