"""What ./deepy.py plan prints: a table of memory by part, a bar of how full a GPU is, what was changed or would help, and the speed to expect."""

from collections import Counter
from collections.abc import Iterator

from launcher.forecast import Forecast, Outlook
from launcher.plan import gigabytes
from launcher.show import table
from launcher.speed import DISK, Speed, card_of
from megatron_lite.models.memory import PARTS, parameters

BAR = 10
CELL = 18
NONE = "·"


def show_outlook(outlook: Outlook) -> str:
    notes = [*outlook.notes, *([outlook.hardware.remark] if outlook.hardware.remark else [])]
    parts = [_headline(outlook), _memory(outlook), _remarks(outlook), _speeds(outlook), "\n".join(notes)]
    return "\n\n".join(part for part in parts if part)


def _headline(outlook: Outlook) -> str:
    spec = outlook.spec
    model = f"{parameters(spec) / 1e9:.2f} billion parameters, {spec.layers} layers of {spec.hidden}, vocabulary {spec.vocab:,} ({spec.family}, {spec.dtype})"
    return f"{' + '.join(map(str, outlook.config.files))}: {model}\non {_machine(outlook)}"


def _machine(outlook: Outlook) -> str:
    limit = outlook.hardware.limit
    return _devices(outlook) + (f"; gpu-memory-limit allows {gigabytes(limit)} a process" if limit is not None else "")


def _devices(outlook: Outlook) -> str:
    hardware = outlook.hardware
    if hardware.kind == "CPU":
        free = f", {gigabytes(hardware.memory)} of memory free" if hardware.memory is not None else ""
        return f"this machine: {hardware.found}{free}; gpus=2x24GB or gpus=8xH100 asks about another"
    counts = Counter(device.name for device in hardware.devices)
    names = " + ".join(f"{count} x {name}" for name, count in counts.items())
    where = "as named" if outlook.is_named else "this machine"
    least = "at least " * (len(counts) > 1)
    return f"{names} ({where}), {least}{gigabytes(min(device.free or 0 for device in hardware.devices))} free on each"


def _memory(outlook: Outlook) -> str:
    """One column for every kind of work, one row for every part: what the fullest process takes."""
    forecasts = outlook.forecasts
    if not forecasts:
        return ""
    fullest = [forecast.plan.stages[_fullest(forecast)] for forecast in forecasts]
    names = [name for name in PARTS.values() if any(name in stage.parts for stage in fullest)]
    itself = "CUDA itself" if outlook.hardware.kind == "GPU" else "the process itself"
    rows = [
        (_per(outlook), *(forecast.work for forecast in forecasts)),
        ("", *(str(forecast.plan.layout) for forecast in forecasts)),
        *((name, *(gigabytes(stage.parts[name]) if name in stage.parts else NONE for stage in fullest)) for name in names),
        (itself, *(gigabytes(forecast.plan.itself) for forecast in forecasts)),
        ("total", *(gigabytes(forecast.plan.largest) for forecast in forecasts)),
        ("", *(_bar(forecast) for forecast in forecasts)),
        ("", *("fits" if forecast.fits else "does not fit" for forecast in forecasts)),
    ]
    return table([tuple(cell.rjust(CELL) if column else cell for column, cell in enumerate(row)) for row in rows], right=range(1, len(forecasts) + 1))


def _per(outlook: Outlook) -> str:
    return "memory of a GPU" if outlook.hardware.kind == "GPU" else "memory of a process"


def _fullest(forecast: Forecast) -> int:
    return max(range(forecast.plan.layout.pp), key=lambda stage: forecast.plan.stages[stage].total)


def _bar(forecast: Forecast) -> str:
    """How much of what is free is taken."""
    plan = forecast.plan
    if plan.hardware.limit is not None:
        taken, free = plan.largest, plan.hardware.limit
    elif plan.hardware.kind == "CPU":
        taken, free = plan.total, plan.hardware.memory
    else:
        pairs = [(plan.taken(rank), plan.hardware.devices[rank].free) for rank in range(plan.layout.size)]
        taken, free = max(((taken, free) for taken, free in pairs if free), key=lambda pair: pair[0] / pair[1], default=(0, None))
    if not free:
        return NONE
    full = min(BAR, max(1, round(BAR * taken / free)))
    return f"{'█' * full}{'░' * (BAR - full)} {100 * taken / free:4.0f} %"


def _remarks(outlook: Outlook) -> str:
    limit = outlook.hardware.limit
    short = f"does not fit{f' in the {gigabytes(limit)} that gpu-memory-limit allows' if limit is not None else ''}: "
    lines = [(forecast.work, "" if forecast.fits else short, forecast.remark) for forecast in outlook.forecasts]
    lines += [(work, "not at all: ", reason) for work, reason in outlook.refused]
    width = max(len(work) for work, _, _ in lines)
    return "\n".join(f"{work.ljust(width)}  {verdict}{remark}" for work, verdict, remark in lines)


def _speeds(outlook: Outlook) -> str:
    lines = list(_speed_lines(outlook))
    return "\n".join(["to expect at best, from bandwidths:", *lines]) if lines else ""


def _speed_lines(outlook: Outlook) -> Iterator[str]:
    if outlook.load is not None and outlook.load[0] >= 0.1:
        disk, memory = outlook.load
        yield f"  loading        {_seconds(disk)} from a disk that reads {DISK / 1e9:.0f} GB/s, {_seconds(memory)} where the files are in the page cache"
    known = [forecast for forecast in outlook.forecasts if forecast.speeds]
    for forecast in known:
        yield f"  {forecast.work.ljust(13)}  {', '.join(map(_speed, forecast.speeds))}"
    if outlook.forecasts and not any(card_of(forecast.plan) for forecast in outlook.forecasts):
        name = "CPUs" if outlook.hardware.kind == "CPU" else outlook.hardware.devices[0].name
        what = "GPUs of which only the memory is named" if name.endswith("B") and name[0].isdigit() else name
        yield f"  tokens/s       not known of {what}; name a card, such as gpus=2xRTX3090"


def _speed(speed: Speed) -> str:
    rows = f" with {speed.rows} row{'s' * (speed.rows > 1)}" if speed.rows else ""
    return f"{speed.tokens:,.0f} tokens/s{rows}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
