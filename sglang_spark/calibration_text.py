"""The text that calibration reads: of our own writing, and nothing else reads it.

Four stretches, each long enough for 256 tokens of usual tokenizers. Every stretch mixes kinds of text, because each is
read at another place of the context: prose and code, languages, data, chat markup. A change of this file changes the
calibration of every server, and so the rows that servers of different versions could exchange.
"""

_PROSE_AND_CODE = '''\
The lighthouse keeper had counted ships for thirty-one years, and in all that time he had never once been wrong. Each \
evening he wrote the number in a ledger bound in green cloth, then the weather, then whatever the radio had said about \
prices in the harbour. "Numbers are company," he told the girl who brought his bread. She didn't believe him, but she \
liked how carefully he sharpened the pencil before every entry. Why did it matter, she asked, whether there had been \
fourteen or fifteen? He thought about it for a while. Because somebody, some day, would need to know.

from collections import defaultdict


class Ledger:
    """Ships per day, with a running mean."""

    def __init__(self, path: str, limit: int = 365):
        self.path = path
        self.entries: dict[str, list[int]] = defaultdict(list)
        self.limit = limit

    def add(self, day: str, count: int) -> float:
        if count < 0:
            raise ValueError(f"{day}: {count} ships cannot be counted")
        self.entries[day].append(count)
        total = sum(sum(values) for values in self.entries.values())
        return total / max(len(self.entries), 1)

    def busiest(self):
        return sorted(self.entries.items(), key=lambda item: -sum(item[1]))[:10]
'''

_LANGUAGES_AND_DATA = """\
Les trains de nuit partent toujours en retard, disait-elle, mais ils arrivent avant l'aube. Der Zug hielt in einem \
kleinen Bahnhof, dessen Namen niemand kannte; draußen lag Schnee, und jemand fegte den Bahnsteig. Nadie bajó, y sin \
embargo el revisor esperó cinco minutos más. Поезд тронулся, и в окне снова поплыли огни. 列车经过一座很长的桥,\
河面上结了冰,远处有几盏灯。駅員は時計を見て、静かに手を上げた。기차는 다시 출발했다.

{
  "route": {"from": "Lyon", "to": "Kraków", "km": 1384.6, "night": true},
  "stops": [
    {"id": 17, "name": "Dijon", "arrives": "22:41", "platform": null},
    {"id": 42, "name": "Frankfurt (Main)", "arrives": "03:08", "platform": "9b"}
  ],
  "fares": {"seat": 59.90, "couchette": 89.00, "sleeper": 149.50},
  "updated": "2021-03-14T07:15:09Z"
}

| train | cars | weight (t) | delay (min) |
|-------|-----:|-----------:|------------:|
| EN 469 | 11 | 512.4 | +7 |
| EN 470 | 9 | 431.0 | 0 |
"""

_CHAT = """\
<|im_start|>system
You are a helpful assistant. Answer briefly, and say so when you do not know.<|im_end|>
<|im_start|>user
My tomato plants have yellow leaves near the bottom. I water them every day. What should I do?<|im_end|>
<|im_start|>assistant
Yellow lower leaves usually mean too much water. A few things to try:

1. **Water less often.** Wait until the top 3 cm of soil are dry.
2. **Check the drainage.** Pots need holes; heavy soil needs sand or compost.
3. **Remove the yellow leaves**, so that air can move around the stem.

If the veins stay green while the leaf turns yellow, it may lack magnesium instead.<|im_end|>
<|im_start|>user
Can you look up the weather in Graz for the next 3 days?<|im_end|>
<|im_start|>assistant
<tool_call>
{"name": "get_forecast", "arguments": {"city": "Graz", "days": 3, "unit": "celsius"}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
[{"day": "Mon", "high": 24, "rain": 0.1}, {"day": "Tue", "high": 19, "rain": 0.7}, {"day": "Wed", "high": 21, "rain": 0}]
</tool_response><|im_end|>
<|im_start|>assistant
It stays mild: 24 °C on Monday, then rain on Tuesday at 19 °C. Skip watering that day.<|im_end|>
"""

_MANUAL_AND_CODE = """\
## Configuration

The daemon reads `/etc/ferry/ferry.toml` at start-up; send it `SIGHUP` to read the file again. Unknown keys are an \
error, not a warning. To find out which settings are in use, run:

    $ ferryctl show --effective --format=json | jq '.queue'
    {"depth": 4096, "workers": 8, "retry_after_ms": 250}

A queue that is full rejects new jobs with status 429. In most deployments the limit is memory: a job takes about \
1.2 KiB, hence 10,000 jobs take roughly 12 MB. See also: backpressure, quotas, and https://example.org/ferry/limits.

static int push(struct queue *q, const struct job *job)
{
    if (q->len >= q->cap)
        return -EAGAIN;                 /* the caller tries again */
    q->slots[(q->head + q->len++) % q->cap] = *job;
    return 0;
}

export async function drain(queue, { signal, onError = console.error } = {}) {
  for await (const job of queue) {
    if (signal?.aborted) break;
    try { await job.run(); } catch (e) { onError(`job ${job.id}: ${e.message}`); }
  }
}

SELECT user_id, COUNT(*) AS jobs, AVG(seconds) FROM runs WHERE state = 'failed' GROUP BY user_id HAVING COUNT(*) > 3;
"""

STRETCHES: tuple[str, ...] = (_PROSE_AND_CODE, _LANGUAGES_AND_DATA, _CHAT, _MANUAL_AND_CODE)
