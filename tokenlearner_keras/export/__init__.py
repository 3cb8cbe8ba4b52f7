from tokenlearner_keras.export.export_model import ExportReport, export_model
from tokenlearner_keras.export.exported_model import ExportedModel, load_exported
from tokenlearner_keras.export.saved_model import export_saved_model

__all__ = [
    "ExportReport",
    "ExportedModel",
    "export_model",
    "export_saved_model",
    "load_exported",
]
