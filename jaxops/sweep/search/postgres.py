"""A search's journal in a Postgres database, for searches that several machines lead in turn.

Tested in tests/sweep/test_search_postgres.py.
"""

from typing import Any

from jaxops.core.failures import RunFailed, UserError
from jaxops.core.secret_text import without_passwords
from jaxops.sweep.search.events import SearchEvent, parse_event

TABLE = "jaxops_search"
_CREATE = f"""CREATE TABLE IF NOT EXISTS {TABLE} (
  search text NOT NULL, number integer NOT NULL, line text NOT NULL, PRIMARY KEY (search, number))"""


class PostgresJournal:
    """A journal in a table of a database: a row for each event, committed before `append` returns.

    The process that leads holds an advisory lock of its session, which ends with its connection. A row is numbered, so
    that a process which has lost its connection and the lead with it cannot write over what another one wrote.

    Args:
      url: `postgresql://HOST/NAME`; user and password come from PGUSER and PGPASSWORD, or ~/.pgpass.
      search: the name of the search, by which its rows are found.

    Raises:
      UserError: the driver is not installed, the URL is of another database, or it does not answer.
    """

    def __init__(self, url: str, search: str) -> None:
        self.where, self._search = f"{without_passwords(url)} ({search})", search
        if not url.startswith(("postgresql://", "postgres://")):
            raise UserError(
                f"search.storage: {without_passwords(url)}: expected postgresql://HOST/NAME, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"
            )
        try:
            import psycopg
        except ImportError:
            raise UserError("search.storage: needs psycopg: pip install 'jaxops[postgres]'") from None
        self._errors: type[Exception] = psycopg.Error
        try:
            self._connection: Any = psycopg.connect(url, autocommit=True, connect_timeout=30)
            self._connection.execute("SELECT pg_advisory_lock(hashtext(%s))", (TABLE,))  # of two, one creates it
            self._connection.execute(_CREATE)
            self._connection.execute("SELECT pg_advisory_unlock(hashtext(%s))", (TABLE,))
        except psycopg.Error as error:
            raise UserError(f"search.storage: {self.where}: {str(error).strip()}") from None
        self._next = 0

    def lead(self) -> bool:
        """Takes the lock, which ends with this process's connection.

        Raises:
          RunFailed: the database does not answer.
        """
        (taken,) = self._one("SELECT pg_try_advisory_lock(hashtext(%s), hashtext(%s))", (TABLE, self._search))
        if taken:
            (count,) = self._one(f"SELECT count(*) FROM {TABLE} WHERE search = %s", (self._search,))
            self._next = int(count)
        return bool(taken)

    def read(self) -> list[SearchEvent]:
        """Returns all events.

        Raises:
          UserError: a row is broken, or of a newer version.
          RunFailed: the database does not answer.
        """
        rows = self._all(f"SELECT number, line FROM {TABLE} WHERE search = %s ORDER BY number", (self._search,))
        return [parse_event(line, f"{self.where}, row {number}") for number, line in rows]

    def append(self, event: SearchEvent, *, durable: bool = True) -> None:
        """Adds an event; each is committed, durable or not.

        Raises:
          RunFailed: the database does not answer, or another process leads by now.
        """
        line = event.line()
        self._run(f"INSERT INTO {TABLE} VALUES (%s, %s, %s)", (self._search, self._next, line))
        self._next += 1

    def close(self) -> None:
        """Ends the connection, and with it the lead."""
        self._connection.close()

    def _one(self, query: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return self._all(query, values)[0]

    def _all(self, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return list(self._run(query, values).fetchall())

    def _run(self, query: str, values: tuple[Any, ...]) -> Any:
        try:
            return self._connection.execute(query, values)
        except self._errors as error:
            raise RunFailed(
                f"the search's journal in {self.where} cannot be used: {str(error).strip()}. Nothing is lost:"
                " the same command goes on"
            ) from None
