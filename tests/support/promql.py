"""What queries in PromQL ask for, as Prometheus would understand them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import promql_parser as promql

Series = list[dict[str, str]]


def parts(expression: Any) -> Iterator[Any]:
    """An expression and all that it is made of."""
    yield expression
    inner = [getattr(expression, name, None) for name in ("expr", "lhs", "rhs", "vector_selector")]
    for each in (*inner, *getattr(expression, "args", ())):
        if each is not None:
            yield from parts(each)


def selectors(expression: Any) -> list[promql.VectorSelector]:
    return [each for each in parts(expression) if isinstance(each, promql.VectorSelector)]


def missing(query: str, exported: dict[str, Series]) -> list[str]:
    """What a query names and nobody exports: metrics, labels, and values of labels. Raises ValueError for no query.

    `exported`: labels of the series by the name of the sample.
    """
    expression = promql.parse(query)
    found = []
    for selector in selectors(expression):
        series = exported.get(selector.name, [])
        if not series:
            found.append(selector.name)
        for matcher in selector.matchers.matchers:
            values = {each.get(matcher.name) for each in series}
            wanted = (
                matcher.value.split("|") if matcher.op in (promql.MatchOp.Re, promql.MatchOp.NotRe) else [matcher.value]
            )
            found += [f"{selector.name}{{{matcher.name}={value!r}}}" for value in wanted if value not in values]
    for each in parts(expression):
        labels = getattr(getattr(each, "modifier", None), "labels", ())
        if isinstance(each, promql.AggregateExpr) and labels:
            for selector in selectors(each):
                have = {name for one in exported.get(selector.name, []) for name in one}
                found += [f"{selector.name} by {label}" for label in labels if label not in have]
    return found


def legend_labels(legend: str) -> set[str]:
    """Labels that a legend of Grafana shows."""
    return set(re.findall(r"{{\s*(\w+)\s*}}", legend))
