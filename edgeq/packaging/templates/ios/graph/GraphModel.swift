import CoreML
import Foundation

/// The model "@NAME@" in Core ML.
///
///     let model = try await GraphModel()
///     let outputs = try model.run([name: values])
///
/// Arrays are given and returned in the order of axes of `inputs` and `outputs`, as the model was
/// published.
public final class GraphModel {
    /// An input or output: its shape, and its name in the Core ML package.
    public struct End: Sendable {
        public let shape: [Int]
        let feature: String

        /// How many numbers it has.
        public var count: Int { shape.reduce(1, *) }
    }

    /// Inputs by name.
    public static let inputs: [String: End] = [
@INPUTS@
    ]

    /// Outputs by name.
    public static let outputs: [String: End] = [
@OUTPUTS@
    ]

    private let model: MLModel

    /// Loads the model. The first time it is compiled for the device, which takes a while.
    public init(computeUnits: MLComputeUnits = .@UNITS@) async throws {
        let url = try await ModelFiles.compiled(
            "@FILE@", digest: "@DIGEST@", keep: ["@DIGEST@"])
        let configuration = MLModelConfiguration()
        configuration.computeUnits = computeUnits
        model = try await MLModel.load(contentsOf: url, configuration: configuration)
    }

    /// Runs the model once: arrays by input name to arrays by output name.
    public func run(_ values: [String: [Float]]) throws -> [String: [Float]] {
        var given: [String: MLFeatureValue] = [:]
        for (name, end) in Self.inputs {
            guard let numbers = values[name], numbers.count == end.count else {
                throw ModelError.missing("the input \(name) with \(end.count) numbers")
            }
            let array = MLMultiArray(MLShapedArray(scalars: numbers, shape: end.shape))
            given[end.feature] = MLFeatureValue(multiArray: array)
        }
        let result = try model.prediction(from: MLDictionaryFeatureProvider(dictionary: given))
        var found: [String: [Float]] = [:]
        for (name, end) in Self.outputs {
            guard let array = result.featureValue(for: end.feature)?.multiArrayValue else {
                throw ModelError.missing("the output \(name)")
            }
            found[name] = MLShapedArray<Float>(converting: array).scalars
        }
        return found
    }
}
