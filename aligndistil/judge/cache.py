"""Replies of judges on disk, so that a question is paid for once, whatever happens after it was answered."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from aligndistil.errors import UserError
from aligndistil.files import cache_root
from aligndistil.judge.asks import Reply

BUSY = 60.0
"""Seconds that a process waits while another one writes."""


class VerdictCache:
    """One SQLite file, which several processes may use at once.

    It keeps the reply, not the verdict: what reads a reply may change, and is then asked about the old one.
    """

    def __init__(self, path: Path | None = None) -> None:
        """By default it is the file `judge/verdicts.sqlite` of the cache. It is opened when it is first used."""
        self.path = path if path is not None else cache_root() / "judge" / "verdicts.sqlite"
        self._connection: sqlite3.Connection | None = None

    def get(self, key: str, repeat: int) -> tuple[Reply, tuple[int, int]] | None:
        """The reply to a request, with its tokens in and out; None where there is none.

        `key` is a SHA-256 of the whole request. Raises UserError as `put` does.
        """
        with self._opened() as connection:
            select = "SELECT reply FROM replies WHERE key = ? AND repeat = ?"
            row = connection.execute(select, (key, repeat)).fetchone()
        if row is None:
            return None
        stored = json.loads(row[0])
        into, out = stored["usage"]
        return Reply(stored["text"], stored["logprobs"]), (into, out)

    def put(self, key: str, repeat: int, reply: Reply, usage: tuple[int, int]) -> None:
        """Store a reply, in place of another one; `usage` are tokens in and out.

        Raises UserError when the file is damaged or cannot be written.
        """
        content = {"text": reply.text, "logprobs": dict(reply.logprobs), "usage": usage}
        row = (key, repeat, json.dumps(content), datetime.now(UTC).isoformat(timespec="seconds"))
        with self._opened() as connection:
            connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", row)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            if self._connection is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Without transactions of its own: each statement is kept when it returns.
                opened = sqlite3.connect(self.path, timeout=BUSY, isolation_level=None, check_same_thread=False)
                opened.execute("PRAGMA journal_mode = TRUNCATE")
                opened.execute("PRAGMA synchronous = NORMAL")
                opened.execute(
                    "CREATE TABLE IF NOT EXISTS replies (key TEXT, repeat INTEGER, reply TEXT NOT NULL, "
                    "date TEXT NOT NULL, PRIMARY KEY (key, repeat)) WITHOUT ROWID"
                )
                self._connection = opened
            yield self._connection
        except (OSError, sqlite3.OperationalError) as error:  # no place, no right, no room, locked
            raise UserError(
                f"the cache of verdicts {self.path} cannot be used ({error}); make room there, or set HF_HOME to a "
                "folder that can be written"
            ) from None
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"the cache of verdicts {self.path} is damaged ({error}); delete it, and its verdicts are asked again"
            ) from None
