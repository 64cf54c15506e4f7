# SPDX-License-Identifier: Apache-2.0
"""The Hub's own endpoints, below /__hub__/ and only where they were asked for: faults to inject, requests seen."""

from __future__ import annotations

from harness.hub.api.calls import JSON_BYTES, Hub, json_object
from harness.hub.faults import faults_from_json
from harness.hub.messages import Request, Response, json_response
from harness.hub.refusals import Refusal

ROOT = "__hub__"


def answer(hub: Hub, request: Request) -> Response:
    """/__hub__/faults: GET, POST {"faults": [...]} adds, PUT replaces, DELETE; /__hub__/journal: GET, DELETE."""
    if not hub.faults_over_http:
        raise Refusal(kind="no_such_page", message="this Hub was not started with --faults")
    page = request.path[1:]
    if page == ("faults",):
        if request.method == "GET":
            return json_response({"faults": hub.faults.as_json()})
        if request.method in ("POST", "PUT"):
            faults = faults_from_json(json_object(request.body.read(limit=JSON_BYTES), what="the body").get("faults"))
            if request.method == "PUT":
                hub.faults.clear()
            hub.faults.add(*faults)
            return json_response({"faults": hub.faults.as_json()})
        if request.method == "DELETE":
            hub.faults.clear()
            return json_response({})
    if page == ("journal",):
        if request.method == "GET":
            return json_response({"requests": hub.journal.as_json()})
        if request.method == "DELETE":
            hub.journal.clear()
            return json_response({})
    if page in (("faults",), ("journal",)):
        raise Refusal(kind="method", message=f"{request.method} is not for {request.target}")
    raise Refusal(kind="no_such_page", message="there are /__hub__/faults and /__hub__/journal")
