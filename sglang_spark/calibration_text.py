"""The text that calibration reads, of our own writing: prose, code, languages, data, chat markup.

Each stretch is read at a position of its own and is longer than 64 tokens of usual tokenizers, which is where it is
cut. A change of this file changes the calibration of every server.
"""

_PROSE = """\
The lighthouse keeper had counted ships for thirty-one years, and in all that time he had never once been wrong. Each \
evening he wrote the number in a ledger bound in green cloth, then the weather, then whatever the radio had said about \
prices in the harbour. "Numbers are company," he told the girl who brought his bread. She didn't believe him, but she \
liked how carefully he sharpened the pencil before every entry.
"""

_PYTHON = '''\
from collections import defaultdict


class Ledger:
    """Ships per day, with a running mean."""

    def __init__(self, path: str, limit: int = 365):
        self.entries: dict[str, list[int]] = defaultdict(list)

    def add(self, day: str, count: int) -> float:
        if count < 0:
            raise ValueError(f"{day}: {count} ships cannot be counted")
        self.entries[day].append(count)
        return sum(map(sum, self.entries.values())) / max(len(self.entries), 1)
'''

_CHAT = """\
<|im_start|>system
You are a helpful assistant. Answer briefly.<|im_end|>
<|im_start|>user
My tomato plants have yellow leaves near the bottom. What should I do?<|im_end|>
<|im_start|>assistant
Yellow lower leaves usually mean too much water. A few things to try:

1. **Water less often.** Wait until the top 3 cm of soil are dry.
2. **Check the drainage.** Pots need holes; heavy soil needs sand or compost.<|im_end|>
"""

_DATA = """\
{
  "route": {"from": "Lyon", "to": "Kraków", "km": 1384.6, "night": true},
  "stops": [
    {"id": 17, "name": "Dijon", "arrives": "22:41", "platform": null},
    {"id": 42, "name": "Frankfurt (Main)", "arrives": "03:08", "platform": "9b"}
  ],
  "fares": {"seat": 59.90, "couchette": 89.00, "sleeper": 149.50},
  "updated": "2021-03-14T07:15:09Z"
}
"""

_LANGUAGES = """\
Les trains de nuit partent toujours en retard. Der Zug hielt in einem kleinen Bahnhof; draußen lag Schnee. Nadie bajó, \
y sin embargo el revisor esperó cinco minutos más. Поезд тронулся, и в окне снова поплыли огни. 列车经过一座很长的桥,\
河面上结了冰,远处有几盏灯。駅員は時計を見て、静かに手を上げた。기차는 다시 출발했다.
"""

_SYSTEMS_CODE = """\
static int push(struct queue *q, const struct job *job)
{
    if (q->len >= q->cap)
        return -EAGAIN;                 /* the caller tries again */
    q->slots[(q->head + q->len++) % q->cap] = *job;
    return 0;
}

SELECT user_id, COUNT(*) AS jobs FROM runs WHERE state = 'failed' GROUP BY user_id HAVING COUNT(*) > 3;
"""

_TOOLS = """\
<|im_start|>user
Can you look up the weather in Graz for the next 3 days?<|im_end|>
<|im_start|>assistant
<tool_call>
{"name": "get_forecast", "arguments": {"city": "Graz", "days": 3, "unit": "celsius"}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
[{"day": "Mon", "high": 24, "rain": 0.1}, {"day": "Tue", "high": 19, "rain": 0.7}]
</tool_response><|im_end|>
"""

_MANUAL = """\
## Configuration

The daemon reads `/etc/ferry/ferry.toml` at start-up; send it `SIGHUP` to read the file again. Unknown keys are an \
error, not a warning. To find out which settings are in use, run:

    $ ferryctl show --effective --format=json | jq '.queue'

A queue that is full rejects new jobs with status 429. In most deployments the limit is memory: a job takes about \
1.2 KiB, hence 10,000 jobs take roughly 12 MB.
"""

# In the order of their positions, kinds mixed.
STRETCHES: tuple[str, ...] = (_PROSE, _PYTHON, _CHAT, _DATA, _LANGUAGES, _SYSTEMS_CODE, _TOOLS, _MANUAL)
