"""The right value for how a text ends, in both languages: is_complete tells them apart.

python -m pytest tests/test_endings.py
"""

import pytest

from lengthen.text.filters import is_complete

EN = "Dear neighbours,\n\nWe will hold the meeting on Monday, and everybody is welcome to it.\n\n"
ZH = "尊敬的各位邻居：\n\n我们将于星期一开会，请大家准时参加，并带好所需的材料。\n\n"

COMPLETE = [
    EN + "Sincerely,\nThe Committee",
    EN + "Best regards,\n[Your Name]",
    EN + "Kind regards,\n\nAnna Berg\nSecretary\n+44 20 7946 0000",
    EN + "Yours faithfully,\n\nJ. Smith\nOakfield, 4 March 2026",
    EN + "With love,\nMum",
    EN + "Love, Grandma",
    EN + "Warmest wishes,\n\n[Your Name]\n[Your Address]",
    EN + "Thank you,\nTom",
    EN + "Your friend,\n\nEmily",
    EN + "— Anna Berg",
    EN + "March 4, 2026",
    EN + "4 March 2026",
    EN + "2026-03-04",
    EN + "THE END",
    EN + "[END]",
    ZH + "谢谢\n李明",
    EN + "#tea #harbour #morning",
    EN + "*The End*",
    EN + "### The End",
    EN + "To be continued...",
    EN + "Amen",
    EN + "Written by Anna Berg",
    EN + "```python\nprint('done')\n```",
    EN + "~~~\nmake test\n~~~",
    EN + "The area is\n\n$$A = \\pi r^2$$",
    EN + "\\[ a^2 + b^2 = c^2 \\]",
    EN + "\\begin{align}\na &= b\n\\end{align}",
    EN + "<p>See you there</p>\n</body>\n</html>",
    EN + "We hope that you will join us 🎉",
    EN + "See you on Monday ❤️",
    EN + "See you on Monday 👍🏽",
    EN + "See you on Monday :)",
    EN + "Everything else is on our page: https://example.org/guide",
    EN + "Read [the guide](https://example.org/guide)",
    EN + "Write to us at hello@example.org",
    EN + "#tea #harbour #morning",
    EN + "This proves the claim ∎",
    EN + "1. Bring a chair.\n2. Bring tea",
    EN + "| day | time |\n| --- | --- |\n| Monday | 8 pm |",
    "The tide came in and took the sand away,\nThe gulls went quiet on the harbour wall,\nAnd we, with little left "
    "to say,\nStood listening to the evening fall",
    "I keep the lamp\n\nWhere ships may see\nThe narrow mouth of stone\nAnd every night\nThe water brings\nA letter of "
    "its own",
    EN + "She said, “Nothing ever ends.”",
    EN + "Bring cups, plates, etc.",
    ZH + "此致\n敬礼\n\n居民委员会\n二〇二六年三月一日",
    ZH + "此致\n敬礼！\n\n李明\n2026年3月1日",
    ZH + "此致\n\n敬礼",
    ZH + "祝您生活愉快\n\n您的朋友\n王芳",
    ZH + "您的邻居：李明",
    ZH + "居民委员会敬上",
    ZH + "爱你的，\n妈妈",
    ZH + "2026年3月1日",
    ZH + "三月一日",
    ZH + "（全文完）",
    ZH + "全剧终",
    ZH + "未完待续",
    ZH + "期待与你见面～",
    ZH + "期待与你见面😊",
    ZH + "更多内容见 https://example.org/zh",
    ZH + "作者：李明",
    ZH + "```\n完成\n```",
    "春风吹过旧石桥\n细雨无声湿柳条\n我在江南等旧友\n一船明月过今宵",
    "我走过山\n也走过一条河\n河水记得我的名字\n而我记得灯火",
    ZH + "一、带椅子\n二、带茶",
]
CUT = [
    EN + "— I never said that you should go and",
    EN + "— the harbour was quiet when they",
    EN + "End of the road he saw a",
    EN + "Signed the papers and went to the",
    "Letters are read by people who have little time for them, and so they are short wherever they can be, and plain."
    "\n\nBest practices\n\nThe first thing",
    "The three reasons are cost, time and",
    "## Conclusion\n\nIn the end, the committee decided to",
    EN + "## Conclusion",
    EN + "### What comes next?",
    EN + "**Conclusion**",
    EN + "Sincerely,",
    EN + "Best regards",
    EN + "In March 2026 we",
    EN + "Please bring a chair for",
    EN + "The meeting will be led by Dr.",
    EN + "Bring something to drink, e.g.",
    EN + "It begins at eight o'clock and everybody who lives in the street",
    EN + "1. Bring a chair.\n2.",
    EN + "1. Bring a chair.\n2. Bring tea and",
    EN + "1. **Chair**: bring one.\n2. **Tea**",
    EN + "1. **Chair**: bring one.\n2. **Tea**:",
    EN + "A. Chairs.\nB.",
    EN + "IV.",
    EN + "21. Bring a chair. 22.",
    EN + "Warm regards,\n\n[Your Name]\n[Last Name",
    EN + "Born: 1765\nService: 1839\nSuccessor: 1842\nDeath: 1842\nWork: 184",
    EN + "```python\nprint('done.')",
    EN + "$$A = \\pi r^2.",
    EN + "More is on our page, https:",
    EN + "The page https://example.org/guide tells how to find",
    EN + "The 🎉 will be at",
    EN + "In the end",
    EN + "Best regards,\nfrom all of us who live in the",
    EN + "With love for the street in which we live we would like to ask everybody who has a chair",
    "The tide came in and took the sand away,\nThe gulls went quiet on the harbour wall,\nAnd we, with little left "
    "to say,\nStood listening to the",
    "The tide came in and took the sand away,\nThe gulls went quiet on the harbour wall,\nAnd we, with little left "
    "to say,\nStood",
    "The tide came in and took the sand away and the gulls\nwent quiet on the harbour wall while we had little\nleft "
    "to say and stood there listening to the evening\nuntil one came and told",
    "综上所述，我们认为最重要的是",
    ZH + "## 结语",
    ZH + "（三）",
    ZH + "三、",
    ZH + "开会的时间是星期一，地点在",
    ZH + "请大家带好椅子、",
    ZH + "最重要的一点：",
    ZH + "一、带椅子\n二、带茶和",
    ZH + "尽管天气不好，邻居们还是来了，因为",
    ZH + "邻居们在院子里坐了很久，谈起了过去",
    ZH + "```\n完成。",
    "春风吹过旧石桥\n细雨无声湿柳条\n我在江南等旧友\n一",
]


@pytest.mark.parametrize("text", COMPLETE)
def test_complete_texts_end_in_more_ways_than_a_full_stop(text):
    for language in ("en", "zh"):  # the endings of both count in either
        assert is_complete(text, language)
        assert is_complete(text + "\n", language)


@pytest.mark.parametrize("text", CUT)
def test_cut_texts_are_not_complete(text):
    assert not is_complete(text, "en")
    assert not is_complete(text, "zh")
