import XCTest

@testable import @MODULE@

/// The model computes on this device what it did when it was packaged.
final class GoldenTests: XCTestCase {
    private struct Index: Decodable {
        struct Array: Decodable {
            let file: String
            let shape: [Int]
        }
        struct Run: Decodable {
            let id: String
            let inputs: [String: Array]
            let outputs: [String: Array]
        }
        let runs: [Run]
    }

    private struct Golden: Decodable {
        let allowed: [String: Double]
    }

    private func data(_ name: String) throws -> Data {
        let folder = try XCTUnwrap(Bundle.module.url(forResource: "golden", withExtension: nil))
        return try Data(contentsOf: folder.appending(path: name))
    }

    private func floats(_ array: Index.Array) throws -> [Float] {
        let raw = try data(URL(filePath: array.file).lastPathComponent)
        return raw.withUnsafeBytes { bytes in
            stride(from: 0, to: bytes.count, by: 4).map {
                Float(bitPattern: UInt32(littleEndian: bytes.loadUnaligned(fromByteOffset: $0, as: UInt32.self)))
            }
        }
    }

    func testOutputsAreTheGoldenOnes() async throws {
        let model = try await GraphModel()
        let index = try JSONDecoder().decode(Index.self, from: try data("inputs.json"))
        let golden = try JSONDecoder().decode(Golden.self, from: try data("coreml.json"))
        var wrong: [String: Double] = [:]
        var size: [String: Double] = [:]
        for run in index.runs {
            let got = try model.run(try run.inputs.mapValues { try floats($0) })
            for (name, array) in run.outputs {
                let right = try floats(array)
                let values = try XCTUnwrap(got[name])
                XCTAssertEqual(values.count, right.count)
                for (value, expected) in zip(values, right) where expected.isFinite {
                    let difference = Double(value) - Double(expected)
                    wrong[name, default: 0] += difference * difference
                    size[name, default: 0] += Double(expected) * Double(expected)
                }
            }
        }
        for (name, limit) in golden.allowed {
            let whole = try XCTUnwrap(size[name])
            let error = (try XCTUnwrap(wrong[name]) / (whole > 0 ? whole : 1)).squareRoot()
            XCTAssertLessThanOrEqual(error, limit, "the output \(name)")
        }
    }
}
