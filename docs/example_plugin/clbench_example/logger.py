"""A logger that writes a table."""

from clbench.training.loggers import LoggedRun, Logger


class Csv(Logger):
    """One line per step and number, in numbers.csv in the run's folder. Settings: `separator`."""

    def __init__(self, run: LoggedRun) -> None:
        super().__init__(run)
        self.separator = run.settings.get("separator", ",")
        self.file = (run.folder / "numbers.csv").open("a", encoding="utf-8")

    def write(self, numbers: dict, step: int) -> None:
        self.file.writelines(f"{step}{self.separator}{name}{self.separator}{v}\n" for name, v in numbers.items())

    def close(self) -> None:
        self.file.close()
