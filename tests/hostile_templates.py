"""Chat templates that try to take the machine down or to get out of the sandbox. Run as a program,
renders them all under a memory limit and prints a JSON object: name -> [outcome, processor seconds]."""

from __future__ import annotations

import json
import resource
import threading
import time
from pathlib import Path

from edgert.chat_template import ChatTemplate
from edgert.errors import TokenizerError

MEMORY = 1 << 30  # bytes, beyond what the process has before it starts

# A value of 2^60 parts in 60 tuples, and two equal ones that share nothing.
SHARED = "{% set ns = namespace(s=(1,)) %}{% for i in range(60) %}{% set ns.s = (ns.s, ns.s) %}{% endfor %}"
TWINS = (
    "{% set ns = namespace(s=[1], t=[1]) %}{% for i in range(60) %}"
    "{% set ns.s = [ns.s, ns.s] %}{% set ns.t = [ns.t, ns.t] %}{% endfor %}"
)

HOSTILE = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested filter": (
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}"
    ),
    "mul": "{{ 'x' * 10**9 }}",
    "mul2": "{{ 10**9 * 'x' }}",
    "center": "{{ 'a'|center(10**9) }}",
    "center m": "{{ 'a'.center(10**9) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "join": "{{ range(99999)|join('x'*100000) }}",
    "join m": "{{ ('x'*100000).join(range(99999)|map('string')) }}",
    "macro": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "macro2": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "double": (
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}"
        "{% endfor %}{{ ns.s }}"
    ),
    "double~": (
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
        "{% endfor %}{{ ns.s }}"
    ),
    "double list": (
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}"
        "{% endfor %}{{ ns.s }}"
    ),
    "share list": SHARED + "{{ ns.s }}",
    "share tojson": SHARED + "{{ ns.s|tojson }}",
    "share eq": TWINS + "{{ ns.s == ns.t }}",
    "share hash": SHARED + "{{ {ns.s: 1} }}",
    "share get": SHARED + "{{ {}[ns.s] }}{{ {}.get(ns.s) }}",
    "share get2": SHARED + "{{ {}.get(ns.s) }}",
    "share changed": TWINS
    + "{% for i in [1, 2] %}{% if loop.changed(ns.s if i == 1 else ns.t) %}{% endif %}{% endfor %}",
    "share unique": SHARED + "{{ [ns.s,ns.s]|unique|list|length }}",
    "share dict": SHARED + "{{ dict([(ns.s,1)]) }}",
    "share fmt": SHARED + "{{ '%s' % (ns.s,) }}",
    "share raise": SHARED + "{{ raise_exception(ns.s) }}",
    "share strftime": SHARED + "{{ strftime_now(ns.s) }}",
    "share trim": SHARED + "{{ ns.s|trim|length }}",
    "share upper": SHARED + "{{ ns.s|upper|length }}",
    "share title": SHARED + "{{ ns.s|title|length }}",
    "share truncate": SHARED + "{{ ns.s|truncate|length }}",
    "share test": SHARED + "{{ ns.s is upper }}",
    "share test2": SHARED + "{{ ns.s is filter }}",
    "share test3": SHARED + "{{ [ns.s]|select('lower')|list }}",
    "share attr": SHARED + "{{ 'x'|attr(ns.s) }}",
    "share mapattr": SHARED + "{{ ['x']|map(attribute=ns.s)|list }}",
    "share default key": SHARED + "{{ [{1:2}]|map(attribute=ns.s)|list }}",
    "share in": TWINS + "{{ ns.s in [ns.t] }}",
    "share isin": TWINS + "{{ ns.s is in [ns.t] }}",
    "share count": TWINS + "{{ [ns.s].count(ns.t) }}",
    "share replace": (
        "{% set ns = namespace(s=[1],t=[1]) %}{% for i in range(60) %}"
        "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ 'x'|replace('x', ns.s) }}"
    ),
    "share nsrepr": (
        "{% set ns = namespace() %}{% set ns.a = ns %}{% set m = namespace(a=ns,b=ns) %}{{ m }}{{ 1/0 }}"
    ),
    "share kw": SHARED + "{% macro m(a) %}{% endmacro %}{{ m(ns.s) }}{{ 1/0 }}",
    "replace": (
        "{% set ns = namespace(s='xx') %}{% for i in range(60) %}"
        "{% set ns.s = ns.s|replace('x', ns.s) %}{% endfor %}"
    ),
    "replace m": (
        "{% set ns = namespace(s='xx') %}{% for i in range(60) %}"
        "{% set ns.s = ns.s.replace('x', ns.s) %}{% endfor %}"
    ),
    "replace e": "{% set ns = namespace(s='x'*100000) %}{{ ns.s.replace('', ns.s) }}",
    "pow": "{{ 10 ** 10 ** 10 }}",
    "powpow": "{% set ns = namespace(s=3) %}{% for i in range(60) %}{% set ns.s = ns.s ** 3 %}{% endfor %}",
    "pow neg": "{{ 2 ** -10000000000 }}{{ 2.0 ** 1000000 }}",
    "intmul": (
        "{% set ns = namespace(s=3) %}{% for i in range(100) %}{% set ns.s = ns.s * ns.s %}{% endfor %}"
    ),
    "fmt": "{{ '%1000000000d' % 1 }}",
    "fmt*": "{{ '%*d' % (1000000000, 1) }}",
    "fmt key": "{{ '%(a(b)c)1000000000d' % {'a(b)c': 1} }}",
    "fmt filter": "{{ '%1000000000d'|format(1) }}",
    "fmt many": "{{ ('%(a)s' * 100000) % {'a': 'x' * 1000000} }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "format_map": "{{ '{a:1000000000}'.format_map({'a':1}) }}",
    "indent": "{{ ('\n' * 1000000)|indent(100000) }}",
    "indent2": "{{ ('\n' * 1000000)|indent(10000) }}",
    "tojson indent": "{{ [1]|tojson(indent=1000000000) }}",
    "tojson sep": "{{ range(1000)|list|tojson(separators=('x'*1000000,'y')) }}",
    "round": "{{ 1.5|round(1000000000, 'ceil') }}",
    "batch": "{{ [1]|batch(10**9,'x')|list }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "sum": "{{ range(1000)|sum }}",
    "cmp": (
        "{% set a = 'x'*4000000 + 'y' %}{% set b = 'x'*4000000 + 'z' %}"
        "{% for i in range(99999) %}{% if a == b %}{% endif %}{% endfor %}"
    ),
    "find": "{% set a = 'x'*4000000 %}{% for i in range(99999) %}{% if a.find('y') %}{% endif %}{% endfor %}",
    "upper": "{% set a = 'x'*4000000 %}{% for i in range(99999) %}{% if a|upper %}{% endif %}{% endfor %}",
    "isupper": (
        "{% set a = 'X'*4000000 %}{% for i in range(99999) %}{% if a is upper %}{% endif %}{% endfor %}"
    ),
    "slice": "{% set a = 'x'*4000000 %}{% for i in range(99999) %}{% if a[1:] %}{% endif %}{% endfor %}",
    "list slice": (
        "{% set a = range(99999)|list %}{% for i in range(99999) %}{% if a[1:] %}{% endif %}{% endfor %}"
    ),
    "range list": "{% for i in range(99999) %}{% set a = range(99999)|list %}{% endfor %}",
    "star": (
        "{% macro f() %}{{varargs}}{% endmacro %}{% for i in range(99999) %}"
        "{% set a = f(*range(99999)) %}{% endfor %}"
    ),
    "select chain": "{% set a = range(99999)|list %}{% for i in range(99999) %}{{ a"
    + "|select" * 400
    + "|list|length }}{% endfor %}",
    "deep list": (
        "{% set ns = namespace(s=[]) %}{% for i in range(99999) %}{% set ns.s = [ns.s] %}"
        "{% endfor %}{{ ns.s }}"
    ),
    "output": "{% for i in range(99999) %}" + "x" * 60000 + "{% endfor %}",
    "set block": "{% set x %}{% for i in range(99999) %}" + "x" * 60000 + "{% endfor %}{% endset %}",
    "macro out": "{% macro m() %}{% for i in range(99999) %}"
    + "x" * 60000
    + "{% endfor %}{% endmacro %}{{ m() }}",
    "filter block": "{% filter upper %}{% for i in range(99999) %}"
    + "x" * 60000
    + "{% endfor %}{% endfilter %}",
    "recursive": "{% for i in [1] recursive %}{{ loop([1,2]) }}{% endfor %}",
    "looplength": (
        "{% for i in range(99999) %}{% for j in range(99999)|select %}"
        "{{ loop.length }}{% break %}{% endfor %}{% endfor %}"
    ),
    "parens": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "parens2": "{{ " + "[" * 20000 + "1" + "]" * 20000 + " }}",
    "nots": "{{ " + "not " * 15000 + "1 }}",
    "plus": "{{ 1" + "+1" * 15000 + " }}{{ 1/0 }}",
    "attrs": "{{ x" + ".x" * 15000 + " }}{{ 1/0 }}",
    "ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000 + "{{ 1/0 }}",
    "fors": "{% for a in [1] %}" * 2000 + "{% endfor %}" * 2000,
    "bigint": "{{ " + "9" * 60000 + " }}",
    "outs": "{{x}}" * 13000 + "{{ 1/0 }}",
    "filters": "{{x" + "|d" * 30000 + "}}{{ 1/0 }}",
    "escape": "{{ ''.__class__.__mro__ }}",
    "escape3": "{{ namespace.__init__.__globals__ }}",
    "escape4": "{{ range.__class__('x') }}",
    "escape5": "{{ (1).to_bytes(1000000000,'big') }}",
    "escape6": "{{ self._TemplateReference__context.environment.budget }}",
    "import": "{% import 'x' as y %}",
    "include": "{% include 'x' %}",
    "block": "{% block x %}{{ self.x() }}{% endblock %}",
    "autoescape": "{% autoescape 'x'*10**9 %}{% endautoescape %}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "zfill": "{{ '1'.zfill(1000000000) }}",
    "translate": "{{ 'a'.translate({97: 'x'*1000000}) }}",
    "append": "{% set l=[] %}{% for i in range(10) %}{{ l.append(l) }}{% endfor %}",
    "while": "{% set ns=namespace(l=[1]) %}{% for a in ns.l %}{% set ns.l = ns.l+[1] %}{% endfor %}{{1/0}}",
    "gen nest": (
        "{% set ns=namespace(l=[1]) %}{% for a in range(99999) %}{% set ns.l = ns.l|select %}"
        "{% endfor %}{{ns.l|list}}"
    ),
    "mem lists": (
        "{% set ns=namespace(l=[]) %}{% for a in range(99999) %}"
        "{% set ns.l = [ns.l, 'x'*4000000] %}{% endfor %}"
    ),
    "mem strs": (
        "{% set ns=namespace(l=()) %}{% for a in range(99999) %}"
        "{% set ns.l = (ns.l, '\U0001f600'*4000000) %}{% endfor %}"
    ),
    "const fold": "{{ ('x' * 100000)|replace('x', 'y' * 100000) }}",
    "const join": "{{ (1,2)|join('x'*1000000000) }}",
    "split": "{% set a = 'x '*2000000 %}{% for i in range(99999) %}{% set b=a.split() %}{% endfor %}",
    "syntax": "{% for %}",
    "unk filter": "{{ 1|nosuch }}",
    "isort": (
        "{% set a = range(99999)|reverse|list %}{% for i in range(99999) %}{% set b = a|sort %}{% endfor %}"
    ),
    "dict items": "{% set d = dict(range(9999)|map('string')|map('list')) %}",
    "cycler": (
        "{% set c = cycler(1,2) %}{% for i in range(99999) %}{% for j in range(99999) %}"
        "{{ c.next() }}{% endfor %}{% endfor %}"
    ),
    "uniq str": "{% set a='x'*4000000 %}{% for i in range(9999) %}{% set b = a|unique|list %}{% endfor %}",
    "first": "{% set a='x'*4000000 %}{% for i in range(99999) %}{% set b = a|reverse|first %}{% endfor %}",
    "comment": "{#" * 30000,
    "ws": " \n" * 32000 + "{{1/0}}",
    "dashes": "{{-" * 20000,
}


def _try_all(outcomes: dict[str, tuple[str, float]]) -> None:
    for name, source in HOSTILE.items():
        start = time.thread_time()
        try:
            text, _ = ChatTemplate(source, {}).render([{"role": "user", "content": "x"}], True, {})
            outcome = f"wrote {text[:60]!r}"
        except TokenizerError as error:
            outcome = f"TokenizerError: {str(error)[:200]}"
        outcomes[name] = (outcome, time.thread_time() - start)


def main() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    outcomes: dict[str, tuple[str, float]] = {}
    thread = threading.Thread(target=_try_all, args=(outcomes,))
    thread.start()
    thread.join()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
