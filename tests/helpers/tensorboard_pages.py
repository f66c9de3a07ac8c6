"""TensorBoard's own server over a folder of logs, in this process and without a socket: what its pages are given."""

import json
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of a package that TensorBoard carries along
    from tensorboard import default, program
    from tensorboard.backend import application
from werkzeug.test import Client


class Pages:
    """Answers what a browser would ask for.

    Args:
        logdir: the folder, read once.
    """

    def __init__(self, logdir):
        board = program.TensorBoard(plugins=default.get_plugins())
        once = ["--load_fast=false", "--reload_interval=0", "--reload_task=blocking"]
        board.configure(argv=["tensorboard", f"--logdir={logdir}", *once])
        provider, multiplexer = board._make_data_provider()
        self._client = Client(
            application.TensorBoardWSGIApp(
                board.flags, board.plugin_loaders, provider, board.assets_zip_provider, multiplexer
            )
        )

    def get(self, path, **query):
        """Returns the body of a page below `/data/plugin/`."""
        answer = self._client.get(f"/data/plugin/{path}", query_string=query)
        assert answer.status_code == 200, (answer.status_code, answer.get_data(as_text=True))
        return answer.get_data()

    def post(self, path, question):
        """Returns what a page below `/data/plugin/` answers to a question, both JSON."""
        answer = self._client.post(f"/data/plugin/{path}", data=json.dumps(question))
        assert answer.status_code == 200, (answer.status_code, answer.get_data(as_text=True))
        return json.loads(answer.get_data())

    def hparams(self):
        """Returns the HPARAMS table: by name of the run `(hyperparameters, metrics)`, and the names in its columns."""
        experiment = self.post("hparams/experiment", {"experimentName": ""})
        metrics = [info["name"] for info in experiment["metricInfos"]]
        columns = [info["name"] for info in experiment["hparamInfos"]], metrics_of(metrics)
        question = {
            "experimentName": "",
            "allowedStatuses": [
                "STATUS_UNKNOWN",
                "STATUS_SUCCESS",
                "STATUS_FAILURE",
                "STATUS_RUNNING",
            ],
            "colParams": [{"metric": name} for name in metrics],
            "startIndex": 0,
            "sliceSize": 100,
        }
        groups = self.post("hparams/session_groups", question)["sessionGroups"]
        rows = {
            group["sessions"][0]["name"].strip("/"): (
                group["hparams"],
                {value["name"]["tag"]: value["value"] for value in group.get("metricValues", [])},
            )
            for group in groups
        }
        return rows, columns


def metrics_of(names):
    return sorted({name["tag"] for name in names})
