// Stand-ins for what the packages' Swift code uses of Core ML, with the signatures of Apple's
// documentation (macOS 15, iOS 18). Nothing is computed.
@_exported import Foundation

public enum MLComputeUnits: Int, Sendable {
    case cpuOnly = 0
    case cpuAndGPU = 1
    case all = 2
    case cpuAndNeuralEngine = 3
}

open class MLModelConfiguration {
    public init() {}
    open var computeUnits: MLComputeUnits = .all
    open var functionName: String?
}

public protocol MLFeatureProvider {
    var featureNames: Set<String> { get }
    func featureValue(for featureName: String) -> MLFeatureValue?
}

public final class MLDictionaryFeatureProvider: MLFeatureProvider {
    public init(dictionary: [String: Any]) throws {}
    public var featureNames: Set<String> { fatalError("a stand-in") }
    public func featureValue(for featureName: String) -> MLFeatureValue? { nil }
}

open class MLFeatureValue {
    public convenience init(multiArray value: MLMultiArray) { self.init() }
    init() {}
    open var multiArrayValue: MLMultiArray? { nil }
}

public protocol MLShapedArrayScalar {}
extension Float: MLShapedArrayScalar {}
extension Double: MLShapedArrayScalar {}
extension Int32: MLShapedArrayScalar {}

public struct MLShapedArray<Scalar: MLShapedArrayScalar> {
    public init<S: Sequence>(scalars: S, shape: [Int]) where S.Element == Scalar {}
    public init(converting multiArray: MLMultiArray) {}
    public var scalars: [Scalar] { fatalError("a stand-in") }
    public var shape: [Int] { fatalError("a stand-in") }
}

open class MLMultiArray {
    public convenience init<Scalar: MLShapedArrayScalar>(_ shapedArray: MLShapedArray<Scalar>) {
        self.init()
    }
    init() {}
    open var count: Int { 0 }
}

public final class MLState: @unchecked Sendable {
    init() {}
}

open class MLModel {
    init() {}
    open class func load(contentsOf url: URL, configuration: MLModelConfiguration)
        async throws -> MLModel
    { fatalError("a stand-in") }
    open class func compileModel(at modelURL: URL) async throws -> URL { fatalError("a stand-in") }
    public func makeState() -> MLState { fatalError("a stand-in") }
    open func prediction(from input: any MLFeatureProvider) throws -> any MLFeatureProvider {
        fatalError("a stand-in")
    }
    public func prediction(from inputFeatures: any MLFeatureProvider, using state: MLState)
        throws -> any MLFeatureProvider
    { fatalError("a stand-in") }
}
